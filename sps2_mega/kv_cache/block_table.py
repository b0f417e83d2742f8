"""Block table of one sequence: an ordered list of (SP rank, block id), one per block.

`placement` chose the ranks and the allocators the ids. The scheduler and every rank
keep the same table. Per-rank views are updated as blocks are appended, so that a
decode step never walks over the whole table.

    block_size 4, 10 tokens, blocks 0 and 1 on rank 0, block 2 on rank 1:
    position 9 -> rank 1, its block id, offset 1
    local_runs(0) = [(0, 8)]   local_runs(1) = [(8, 10)]
"""

from __future__ import annotations

from collections.abc import Sequence


class BlockTable:
    """Ordered blocks; block i holds token positions [i * block_size, (i + 1) * block_size)."""

    __slots__ = ("_block_ids", "_local_blocks", "_local_runs", "_ranks", "block_size")

    def __init__(self, block_size: int) -> None:
        assert block_size >= 1, f"block_size must be >= 1, got {block_size}"
        self.block_size = block_size
        self._ranks: list[int] = []
        self._block_ids: list[int] = []
        self._local_blocks: dict[int, list[tuple[int, int]]] = {}
        self._local_runs: dict[int, list[tuple[int, int]]] = {}  # of block indices, end exclusive

    @property
    def num_blocks(self) -> int:
        return len(self._block_ids)

    @property
    def capacity(self) -> int:
        """Number of tokens that the blocks of this table can hold."""
        return len(self._block_ids) * self.block_size

    @property
    def last_rank(self) -> int:
        """SP rank of the last block."""
        assert self._ranks, "an empty block table has no last block"
        return self._ranks[-1]

    @property
    def ranks(self) -> Sequence[int]:
        """SP rank of each block: the table's own list, read-only for callers."""
        return self._ranks

    @property
    def block_ids(self) -> Sequence[int]:
        """Block id of each block on its rank: the table's own list, read-only for callers."""
        return self._block_ids

    def append(self, rank: int, block_id: int) -> None:
        """Append the next block of the sequence."""
        index = len(self._block_ids)
        self._ranks.append(rank)
        self._block_ids.append(block_id)
        self._local_blocks.setdefault(rank, []).append((index, block_id))
        runs = self._local_runs.setdefault(rank, [])
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))

    def extend(self, ranks: Sequence[int], block_ids: Sequence[int]) -> None:
        assert len(ranks) == len(block_ids), f"{len(ranks)} ranks for {len(block_ids)} blocks"
        for rank, block_id in zip(ranks, block_ids, strict=True):
            self.append(rank, block_id)

    def locate(self, position: int) -> tuple[int, int, int]:
        """(SP rank, block id, offset in the block) of a token position."""
        index, offset = divmod(position, self.block_size)
        assert 0 <= index < len(self._block_ids), (
            f"position {position} is outside the {self.capacity} tokens of this block table"
        )
        return self._ranks[index], self._block_ids[index], offset

    def local_blocks(self, rank: int) -> Sequence[tuple[int, int]]:
        """(block index, block id) of the blocks on `rank`, in token order.

        The list is read-only for callers and grows with `append`.
        """
        return self._local_blocks.get(rank, ())

    def local_runs(self, rank: int, num_tokens: int) -> list[tuple[int, int]]:
        """Token positions [start, end) below `num_tokens` on `rank`; adjacent blocks are merged."""
        assert 0 <= num_tokens <= self.capacity, (
            f"num_tokens ({num_tokens}) is not in [0, {self.capacity}], the tokens of this block "
            "table"
        )
        runs = []
        for first, end in self._local_runs.get(rank, ()):
            start = first * self.block_size
            if start >= num_tokens:
                break
            runs.append((start, min(end * self.block_size, num_tokens)))
        return runs

    def num_local_tokens(self, rank: int, num_tokens: int) -> int:
        """Number of the first `num_tokens` tokens that are on `rank`.

        O(1) if they reach into the last block.
        """
        if self._ranks and self.capacity - self.block_size < num_tokens <= self.capacity:
            unused = self.capacity - num_tokens if self._ranks[-1] == rank else 0
            return len(self.local_blocks(rank)) * self.block_size - unused
        return sum(end - start for start, end in self.local_runs(rank, num_tokens))
