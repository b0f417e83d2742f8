"""Free and used KV cache blocks of one SP rank, with a holder count for each used block.

The allocator does not choose the rank or the sequence of a block (see `placement` and `ledger`) or
the blocks worth keeping (`prefix_cache`), and touches no tensor. Ids are handed out lowest first,
so that long prompts tend to get neighbouring blocks.

    empty --allocate--> held --free--> empty
                         | keep: later requests may find its content
                        held --free--> evictable --share--> held, --forget--> empty
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

_BULK = 64  # from here on one sort is cheaper than a heap operation per block


class BlockAllocator:
    """Allocator whose blocks are each empty, held at least once, or evictable; `num_blocks` in all.

    Callers check first: running out is an expected outcome, but allocating regardless is a bug and
    stops the program with an AssertionError, as do double frees and ids that do not exist.
    """

    __slots__ = ("_empty", "_evictable", "_kept", "_ref_counts", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 0, f"num_blocks must be >= 0, got {num_blocks}"
        self.num_blocks = num_blocks
        self._empty = list(range(num_blocks))  # a heap; an ascending list is one
        self._ref_counts = [0] * num_blocks
        self._kept: set[int] = set()
        # Least recently used first. A plain dict would walk over its
        # deleted entries to find the first one.
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Number of blocks without holders: empty ones and evictable ones."""
        return len(self._empty) + len(self._evictable)

    @property
    def num_empty(self) -> int:
        """Number of blocks that can be allocated without evicting."""
        return len(self._empty)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether `num_blocks` blocks are empty."""
        return num_blocks <= len(self._empty)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take the lowest empty ids, ascending, each with one holder."""
        assert num_blocks >= 0, f"cannot allocate {num_blocks} blocks"
        assert self.can_allocate(num_blocks), (
            f"{num_blocks} blocks requested, {self.num_empty} of {self.num_blocks} are free"
        )
        if num_blocks >= _BULK:
            self._empty.sort()
            taken = self._empty[:num_blocks]
            del self._empty[:num_blocks]  # the rest is ascending: still a heap
        else:
            taken = [heapq.heappop(self._empty) for _ in range(num_blocks)]
        for block_id in taken:
            self._ref_counts[block_id] = 1
        return taken

    def share(self, block_ids: Sequence[int]) -> None:
        """Add one holder to each of these held or evictable blocks."""
        for block_id in block_ids:
            if block_id in self._evictable:
                del self._evictable[block_id]
            else:
                self._assert_used(block_id, "share")
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Remove one holder from each block.

        A block without holders can be allocated again, a kept one only after `forget`. Kept blocks
        that lose their last holder become evictable in the given order.
        """
        released = []
        for block_id in block_ids:
            self._assert_used(block_id, "free")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if block_id in self._kept:
                    self._evictable[block_id] = None
                else:
                    released.append(block_id)
        self._put_back(released)

    def keep(self, block_id: int) -> None:
        """Mark a held block's content as worth keeping after its last holder."""
        self._assert_used(block_id, "keep")
        self._kept.add(block_id)

    def forget(self, block_id: int) -> None:
        """Mark a kept block's content as no longer worth keeping.

        An evictable block becomes empty at once.
        """
        assert block_id in self._kept, f"cannot forget block {block_id}: it is not kept"
        self._kept.remove(block_id)
        if block_id in self._evictable:
            del self._evictable[block_id]
            self._put_back([block_id])

    def next_to_evict(self) -> int:
        """Least recently used evictable block."""
        assert self._evictable, "there is no evictable block"
        return next(iter(self._evictable))

    def is_evictable(self, block_id: int) -> bool:
        return block_id in self._evictable

    def ref_count(self, block_id: int) -> int:
        assert 0 <= block_id < self.num_blocks, f"block {block_id} is not in [0, {self.num_blocks})"
        return self._ref_counts[block_id]

    def kept(self) -> set[int]:
        """Copy of the ids that are kept, held or not."""
        return set(self._kept)

    def check_integrity(self) -> None:
        """Recount everything, in O(num_blocks).

        Raises an AssertionError if a block is lost or counted twice.
        """
        empty, evictable = set(self._empty), set(self._evictable)
        assert len(empty) == len(self._empty), "a block is in the free list twice"
        assert all(0 <= block_id < self.num_blocks for block_id in empty | evictable), (
            "a free block does not exist"
        )
        assert not empty & self._kept, "an empty block is kept"
        assert evictable <= self._kept, "a block is evictable without being kept"
        without_holders = empty | evictable
        wrong = [
            i
            for i, count in enumerate(self._ref_counts)
            if (count == 0) != (i in without_holders) or count < 0
        ]
        assert not wrong, f"free list and ref counts disagree on blocks {wrong[:8]}"
        used = sum(count > 0 for count in self._ref_counts)
        assert len(empty) + len(evictable) + used == self.num_blocks, "a block is in two states"

    def _put_back(self, block_ids: list[int]) -> None:
        if len(block_ids) >= _BULK:
            self._empty.extend(block_ids)
            heapq.heapify(self._empty)
        else:
            for block_id in block_ids:
                heapq.heappush(self._empty, block_id)

    def _assert_used(self, block_id: int, verb: str) -> None:
        assert 0 <= block_id < self.num_blocks, (
            f"cannot {verb} block {block_id}: it is not in [0, {self.num_blocks})"
        )
        assert self._ref_counts[block_id] > 0, f"cannot {verb} block {block_id}: it is free already"
