"""Who holds which KV cache block on which sp rank: one allocator per rank, one block table per sequence.

Decides nothing about order or priority (that is the scheduler's); asks `placement` where blocks go.
Rank 0 keeps the only ledger; the other ranks learn the outcome from the step plan.
"""

from __future__ import annotations

from sps2_mega.kv_cache.allocator import BlockAllocator
from sps2_mega.kv_cache.block_table import BlockTable
from sps2_mega.kv_cache.placement import Layout, next_block_rank, prompt_block_ranks


class BlockLedger:
    """Every used block belongs to the table of a sequence that is in the ledger, and to no other."""

    __slots__ = ("_allocators", "_layout", "_num_tails", "_tables", "block_size")

    def __init__(self, *, num_blocks: int, sp_size: int, block_size: int, layout: Layout) -> None:
        """`num_blocks` is per sp rank."""
        self.block_size = block_size
        self._layout = layout
        self._allocators = [BlockAllocator(num_blocks) for _ in range(sp_size)]
        self._num_tails = [0] * sp_size  # sequences whose last block is on the rank
        self._tables: dict[int, BlockTable] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks of all sp ranks together."""
        return sum(allocator.num_blocks for allocator in self._allocators)

    @property
    def free_per_rank(self) -> list[int]:
        return [allocator.num_free for allocator in self._allocators]

    @property
    def num_free(self) -> int:
        return sum(allocator.num_free for allocator in self._allocators)

    @property
    def num_sequences(self) -> int:
        return len(self._tables)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def table(self, seq_id: int) -> BlockTable:
        return self._tables[seq_id]

    def admit(self, seq_id: int, num_tokens: int, *, spare_blocks: int) -> BlockTable | None:
        """A table with room for `num_tokens` (>= 1) tokens; None if fewer than `spare_blocks` stayed free."""
        assert seq_id not in self._tables, f"sequence {seq_id} has blocks already"
        assert num_tokens >= 1, f"sequence {seq_id} has no tokens"
        num_blocks = self.blocks_for(num_tokens)
        if num_blocks + spare_blocks > self.num_free:
            return None
        ranks = prompt_block_ranks(num_blocks, self.free_per_rank, self._layout)
        assert ranks is not None, "placement refuses what the free blocks allow"
        ids = [iter(a.allocate(ranks.count(rank))) for rank, a in enumerate(self._allocators)]
        table = BlockTable(self.block_size)
        table.extend(ranks, [next(ids[rank]) for rank in ranks])
        self._tables[seq_id] = table
        self._num_tails[table.last_rank] += 1
        return table

    def grow(self, seq_id: int) -> tuple[int, int] | None:
        """One more block for a sequence, as (sp rank, block id); None when no rank has a free one."""
        table = self._tables[seq_id]
        self._num_tails[table.last_rank] -= 1
        rank = next_block_rank(self._num_tails, self.free_per_rank)
        if rank is None:
            self._num_tails[table.last_rank] += 1
            return None
        (block_id,) = self._allocators[rank].allocate(1)
        table.append(rank, block_id)
        self._num_tails[rank] += 1
        return rank, block_id

    def release(self, seq_id: int) -> None:
        """Give back all blocks of a sequence."""
        table = self._tables.pop(seq_id)
        self._num_tails[table.last_rank] -= 1
        for rank, allocator in enumerate(self._allocators):
            allocator.free([block_id for _, block_id in table.local_blocks(rank)])

    def check_integrity(self) -> None:
        """Recount all blocks from the tables. Raises AssertionError when one is lost or held twice."""
        for rank, allocator in enumerate(self._allocators):
            allocator.check_integrity()
            held = [b for table in self._tables.values() for _, b in table.local_blocks(rank)]
            assert len(held) == len(set(held)), f"a block of sp rank {rank} is in two block tables"
            assert len(held) == allocator.num_used, (
                f"sp rank {rank}: {allocator.num_used} blocks are used, block tables hold {len(held)}"
            )
            tails = sum(table.last_rank == rank for table in self._tables.values())
            assert tails == self._num_tails[rank], f"sp rank {rank}: last blocks are miscounted"
