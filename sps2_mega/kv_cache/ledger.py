"""Ledger of KV cache blocks: one allocator per SP rank, one block table per sequence.

The scheduler decides order and priority, `scheduler.prefix_sharing` decides sharing,
and `placement` chooses the ranks of new blocks. Rank 0 keeps the only ledger; the
other ranks learn the outcome from the step plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from sps2_mega.kv_cache.allocator import BlockAllocator
from sps2_mega.kv_cache.block_table import BlockTable
from sps2_mega.kv_cache.placement import Layout, Spread, next_block_rank, spread_block_ranks
from sps2_mega.kv_cache.prefix_cache import CachedBlock, PrefixCache, Spans


class BlockLedger:
    """Blocks and their owners: every used block is in the table of a sequence of the ledger.

    A block belongs to one table, or as a findable block of a common prefix to several.
    """

    __slots__ = (
        "_allocators",
        "_num_tails",
        "_prefixes",
        "_spread",
        "_tables",
        "block_size",
    )

    def __init__(
        self, *, num_blocks: int, sp_size: int, block_size: int, layout: Layout, stripe: int = 1
    ) -> None:
        """Create an empty ledger of `num_blocks` blocks per SP rank.

        `layout` and `stripe` (consecutive blocks on one rank in layout `striped`) place a
        prompt unless `admit` gets another spread.
        """
        self.block_size = block_size
        self._spread = Spread(layout, (stripe,))
        self._allocators = [BlockAllocator(num_blocks) for _ in range(sp_size)]
        self._prefixes = PrefixCache()
        self._num_tails = [0] * sp_size  # sequences whose last block is on the rank
        self._tables: dict[int, BlockTable] = {}

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all SP ranks together."""
        return sum(allocator.num_blocks for allocator in self._allocators)

    @property
    def free_per_rank(self) -> list[int]:
        return [allocator.num_free for allocator in self._allocators]

    @property
    def used_per_rank(self) -> tuple[int, ...]:
        """Number of blocks that sequences hold, per SP rank."""
        return tuple(allocator.num_used for allocator in self._allocators)

    @property
    def spread(self) -> Spread:
        """Placement of prompts unless `admit` gets another one."""
        return self._spread

    @property
    def sp_size(self) -> int:
        return len(self._allocators)

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

    def find_prefix(
        self, chain: Sequence[bytes], accepts: Callable[[Spans], bool]
    ) -> list[CachedBlock]:
        """Longest findable start of a chain of block digests, under spans that `accepts` allows."""
        return self._prefixes.find(chain, accepts)

    def admit(
        self,
        seq_id: int,
        num_tokens: int,
        *,
        spare_blocks: int,
        prefix: Sequence[CachedBlock] = (),
        spread: Spread | None = None,
    ) -> BlockTable | None:
        """Allocate a table for `num_tokens` (>= 1) tokens; None if it does not fit.

        It fits if `spare_blocks` stay free. The table begins with the shared blocks of
        `prefix`; the others are placed by `spread`.
        """
        assert seq_id not in self._tables, f"sequence {seq_id} has blocks already"
        assert num_tokens >= 1, f"sequence {seq_id} has no tokens"
        num_blocks = self.blocks_for(num_tokens) - len(prefix)
        assert num_blocks >= 1, f"sequence {seq_id} would have nothing to compute"
        room = self.num_free - num_blocks - spare_blocks
        if room < 0:
            return None
        # A prefix that no running sequence shares is evictable, so sharing it takes free blocks.
        if sum(self._allocators[b.sp_rank].is_evictable(b.block_id) for b in prefix) > room:
            return None
        table = BlockTable(self.block_size)
        for block in prefix:
            self._allocators[block.sp_rank].share([block.block_id])
            table.append(block.sp_rank, block.block_id)
        ranks = spread_block_ranks(num_blocks, self.free_per_rank, spread or self._spread)
        assert ranks is not None, "placement refuses what the free blocks allow"
        ids = [iter(self._take(rank, ranks.count(rank))) for rank in range(len(self._allocators))]
        table.extend(ranks, [next(ids[rank]) for rank in ranks])
        self._tables[seq_id] = table
        self._num_tails[table.last_rank] += 1
        return table

    def grow(self, seq_id: int) -> tuple[int, int] | None:
        """Append one block to a sequence, as (SP rank, block id); None without a free block."""
        table = self._tables[seq_id]
        self._num_tails[table.last_rank] -= 1
        rank = next_block_rank(self._num_tails, self.free_per_rank)
        if rank is None:
            self._num_tails[table.last_rank] += 1
            return None
        (block_id,) = self._take(rank, 1)
        table.append(rank, block_id)
        self._num_tails[rank] += 1
        return rank, block_id

    def publish(self, seq_id: int, chain: Sequence[bytes], spans: Spans) -> None:
        """Make the first `len(chain)` blocks of a sequence, which must be full, findable.

        Blocks of a prefix that is findable already, in whatever blocks, are skipped.
        """
        table = self._tables[seq_id]
        for index in range(self._prefixes.num_findable(chain, spans), len(chain)):
            place = table.ranks[index], table.block_ids[index]
            self._prefixes.add(chain, index, spans, place)
            self._allocators[place[0]].keep(place[1])

    def release(self, seq_id: int) -> None:
        """Release all blocks of a sequence; findable ones stay findable until they are evicted."""
        table = self._tables.pop(seq_id)
        self._num_tails[table.last_rank] -= 1
        for rank, allocator in enumerate(self._allocators):
            # Last block first, so that the end of a prefix is evicted before its beginning.
            allocator.free([block_id for _, block_id in reversed(table.local_blocks(rank))])

    def check_integrity(self) -> None:
        """Recount all blocks from the tables.

        Raises an AssertionError if a block is lost or held without a table.
        """
        self._prefixes.check_integrity()
        findable = self._prefixes.places()
        kept = {(r, b) for r, allocator in enumerate(self._allocators) for b in allocator.kept()}
        assert kept == findable, "kept blocks are not the findable ones"
        for rank, allocator in enumerate(self._allocators):
            allocator.check_integrity()
            held = Counter(b for t in self._tables.values() for _, b in t.local_blocks(rank))
            assert len(held) == allocator.num_used, (
                f"sp rank {rank}: {allocator.num_used} blocks are used, block tables hold "
                f"{len(held)}"
            )
            for block_id, count in held.items():
                assert allocator.ref_count(block_id) == count, (
                    f"sp rank {rank}: block {block_id} has {allocator.ref_count(block_id)} "
                    "holders, "
                    f"it is in {count} block tables"
                )
            tails = sum(table.last_rank == rank for table in self._tables.values())
            assert tails == self._num_tails[rank], f"sp rank {rank}: last blocks are miscounted"

    def _take(self, rank: int, num_blocks: int) -> list[int]:
        """Take blocks of a rank with enough free ones, evicting if too few of them are empty."""
        allocator = self._allocators[rank]
        while allocator.num_empty < num_blocks:
            # Blocks after an evicted one cannot be found without it, on whatever rank they are.
            for other, block_id in self._prefixes.remove((rank, allocator.next_to_evict())):
                self._allocators[other].forget(block_id)
        return allocator.allocate(num_blocks)
