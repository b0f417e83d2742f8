"""Block tables of running sequences on one SP rank, kept up to date step by step.

A row has only this rank's blocks, in token order, so attention over a row sees this rank's share of
the sequence. Every rank also knows each sequence's last block, since its owner runs the sequence's
linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class LocalTables:
    """Rows of (block ids, block indices, token count) for the job's sequences on SP rank `rank`."""

    def __init__(self, *, rank: int, block_size: int) -> None:
        self._rank, self._block_size = rank, block_size
        self._rows: dict[int, int] = {}
        self._free_rows: list[int] = []
        self._last_block: dict[int, tuple[int, int]] = {}
        self._block_ids = np.zeros((8, 8), dtype=np.int64)
        self._block_indices = np.zeros((8, 8), dtype=np.int64)
        self._num_blocks = np.zeros(8, dtype=np.int64)
        self._num_tokens = np.zeros(8, dtype=np.int64)
        self._tenancies = np.zeros(8, dtype=np.int64)  # how often a row was given to a sequence

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, seq_id: int, block_ranks: Sequence[int], block_ids: Sequence[int], num_tokens: int
    ) -> None:
        """Add a sequence with `num_tokens` cached tokens in the given blocks (of all ranks)."""
        row = self._new_row(seq_id)
        local = np.flatnonzero(np.asarray(block_ranks) == self._rank)
        self._reserve_columns(len(local))
        self._block_ids[row, : len(local)] = np.asarray(block_ids)[local]
        self._block_indices[row, : len(local)] = local
        self._num_blocks[row] = len(local)
        unused = len(block_ids) * self._block_size - num_tokens
        holds_last = block_ranks[-1] == self._rank
        self._num_tokens[row] = len(local) * self._block_size - (unused if holds_last else 0)
        self._last_block[seq_id] = (block_ranks[-1], block_ids[-1])

    def add_block(self, seq_id: int, rank: int, block_id: int, index: int) -> None:
        """Open block number `index` of a sequence on SP rank `rank`."""
        self._last_block[seq_id] = (rank, block_id)
        if rank != self._rank:
            return
        row = self._rows[seq_id]
        column = int(self._num_blocks[row])
        self._reserve_columns(column + 1)
        self._block_ids[row, column] = block_id
        self._block_indices[row, column] = index
        self._num_blocks[row] += 1

    def last_rank(self, seq_id: int) -> int:
        """SP rank of the sequence's last block."""
        return self._last_block[seq_id][0]

    def append_token(self, seq_id: int, position: int) -> int:
        """Count a token that this rank caches at `position`; return its slot."""
        rank, block_id = self._last_block[seq_id]
        assert rank == self._rank
        self._num_tokens[self._rows[seq_id]] += 1
        return block_id * self._block_size + position % self._block_size

    def block_ids(self, seq_id: int, *, first: int) -> np.ndarray:
        """Ids of this rank's blocks of a sequence, from its block number `first` on."""
        row = self._rows[seq_id]
        count = self._num_blocks[row]
        return self._block_ids[row, :count][self._block_indices[row, :count] >= first]

    def block_map(self, seq_id: int) -> np.ndarray:
        """Id of each block of a sequence up to this rank's last one; -1 on other ranks."""
        row = self._rows[seq_id]
        indices = self._block_indices[row, : self._num_blocks[row]]
        blocks = np.full(int(indices[-1]) + 1 if len(indices) else 0, -1, dtype=np.int64)
        blocks[indices] = self._block_ids[row, : self._num_blocks[row]]
        return blocks

    def remove(self, seq_id: int) -> None:
        row = self._rows.pop(seq_id)
        del self._last_block[seq_id]
        self._num_blocks[row] = self._num_tokens[row] = 0
        self._free_rows.append(row)

    def rows(self, seq_ids: Sequence[int]) -> np.ndarray:
        """Row of each sequence, valid as long as it runs."""
        return np.array([self._rows[seq_id] for seq_id in seq_ids], dtype=np.int64)

    def row(self, row: int) -> np.ndarray:
        """Block ids of a row, to be read only."""
        return self._block_ids[row, : self._num_blocks[row]]

    def fill(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tenancy [B], blocks [B]); while a row's tenancy stays, blocks are only added to it."""
        return self._tenancies[rows_B], self._num_blocks[rows_B]

    def longest(self, rows_B: np.ndarray) -> int:
        """Blocks of the longest of the given rows."""
        return int(self._num_blocks[rows_B].max(initial=0))

    def view(
        self, seq_ids: Sequence[int], first_visible: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(block ids [B, M], start [B], end [B]): row b sees its local tokens [start, end).

        `first_visible[b]` is the first token position that a sliding window lets the sequence see.
        """
        rows = self.rows(seq_ids)
        return self._block_ids[rows, : self.longest(rows)], *self.ranges(rows, first_visible)

    def ranges(
        self, rows: np.ndarray, first_visible: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(start [B], end [B]) as in `view`, for the sequences of the given rows."""
        ends = self._num_tokens[rows]
        if first_visible is None:
            return np.zeros_like(ends), ends
        longest = self.longest(rows)
        indices = self._block_indices[rows, :longest]
        valid = np.arange(longest) < self._num_blocks[rows, None]
        first_block, offset = np.divmod(first_visible, self._block_size)
        hidden_blocks = (valid & (indices < first_block[:, None])).sum(1)
        cut = (valid & (indices == first_block[:, None])).any(1)
        return hidden_blocks * self._block_size + cut * offset, ends

    def _new_row(self, seq_id: int) -> int:
        assert seq_id not in self._rows, f"sequence {seq_id} is already running"
        if not self._free_rows:
            used, rows = len(self._rows), len(self._num_blocks)
            if used == rows:
                self._block_ids = _grow(self._block_ids, 0)
                self._block_indices = _grow(self._block_indices, 0)
                self._num_blocks = _grow(self._num_blocks, 0)
                self._num_tokens = _grow(self._num_tokens, 0)
                self._tenancies = _grow(self._tenancies, 0)
            self._free_rows = list(range(len(self._num_blocks) - 1, used - 1, -1))
        row = self._free_rows.pop()
        self._tenancies[row] += 1
        self._rows[seq_id] = row
        return row

    def _reserve_columns(self, needed: int) -> None:
        while needed > self._block_ids.shape[1]:
            self._block_ids = _grow(self._block_ids, 1)
            self._block_indices = _grow(self._block_indices, 1)


def _grow(array: np.ndarray, axis: int) -> np.ndarray:
    return np.concatenate([array, np.zeros_like(array)], axis)
