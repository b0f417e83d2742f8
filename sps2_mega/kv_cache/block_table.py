"""Block table of one sequence: an ordered list of (SP rank, block id), one per block.

`placement` chose the ranks and the allocators the ids. The scheduler and every rank keep the same
table. Per-rank views are updated as blocks are appended, so that a decode step never walks over
the whole table.

    block_size 4, 10 tokens, blocks 0 and 1 on rank 0, block 2 on rank 1:
    position 9 -> rank 1, its block id, offset 1      local_blocks(0) = [(0, id), (1, id)]
"""

from __future__ import annotations

from collections.abc import Sequence


class BlockTable:
    """Ordered blocks; block i holds token positions [i * block_size, (i + 1) * block_size)."""

    __slots__ = ("_block_ids", "_local_blocks", "_ranks", "block_size")

    def __init__(self, block_size: int) -> None:
        assert block_size >= 1, f"block_size must be >= 1, got {block_size}"
        self.block_size = block_size
        self._ranks: list[int] = []
        self._block_ids: list[int] = []
        self._local_blocks: dict[int, list[tuple[int, int]]] = {}

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

    def extend(self, ranks: Sequence[int], block_ids: Sequence[int]) -> None:
        assert len(ranks) == len(block_ids), f"{len(ranks)} ranks for {len(block_ids)} blocks"
        for rank, block_id in zip(ranks, block_ids, strict=True):
            self.append(rank, block_id)

    def local_blocks(self, rank: int) -> Sequence[tuple[int, int]]:
        """(block index, block id) of the blocks on `rank`, in token order.

        The list is read-only for callers and grows with `append`.
        """
        return self._local_blocks.get(rank, ())
