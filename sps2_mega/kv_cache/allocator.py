"""Which KV cache blocks of one sp rank are free, and how many holders each used block has.

Decides nothing about which rank or which sequence gets a block (see `placement` and `ledger`) and touches
no tensor. Ids are handed out lowest first, so that long prompts tend to get neighbouring blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_BULK = 64  # from here on one sort is cheaper than a heap operation per block


class BlockAllocator:
    """Every block is either free or held at least once; the two together are always `num_blocks`.

    Callers ask `can_allocate` first: running out is an expected outcome, allocating regardless is a bug
    and stops the program with an AssertionError, as do double frees and ids that do not exist.
    """

    __slots__ = ("_free", "_ref_counts", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 0, f"num_blocks must be >= 0, got {num_blocks}"
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))  # a heap; an ascending list is one
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """The lowest free ids, ascending, each with one holder."""
        assert num_blocks >= 0, f"cannot allocate {num_blocks} blocks"
        assert self.can_allocate(num_blocks), (
            f"{num_blocks} blocks asked for, {self.num_free} of {self.num_blocks} are free"
        )
        if num_blocks >= _BULK:
            self._free.sort()
            taken = self._free[:num_blocks]
            del self._free[:num_blocks]  # what is left is ascending: still a heap
        else:
            taken = [heapq.heappop(self._free) for _ in range(num_blocks)]
        for block_id in taken:
            self._ref_counts[block_id] = 1
        return taken

    def share(self, block_ids: Sequence[int]) -> None:
        """One more holder for each of these used blocks."""
        for block_id in block_ids:
            self._assert_used(block_id, "share")
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """One holder less for each; a block without holders can be allocated again."""
        released = []
        for block_id in block_ids:
            self._assert_used(block_id, "free")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                released.append(block_id)
        if len(released) >= _BULK:
            self._free.extend(released)
            heapq.heapify(self._free)
        else:
            for block_id in released:
                heapq.heappush(self._free, block_id)

    def ref_count(self, block_id: int) -> int:
        assert 0 <= block_id < self.num_blocks, f"block {block_id} is not in [0, {self.num_blocks})"
        return self._ref_counts[block_id]

    def check_integrity(self) -> None:
        """Recount everything, in O(num_blocks). Raises AssertionError when a block is lost or held twice over."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert all(0 <= block_id < self.num_blocks for block_id in free), (
            "a free block does not exist"
        )
        wrong = [
            i
            for i, count in enumerate(self._ref_counts)
            if (count == 0) != (i in free) or count < 0
        ]
        assert not wrong, f"free list and ref counts disagree on blocks {wrong[:8]}"

    def _assert_used(self, block_id: int, verb: str) -> None:
        assert 0 <= block_id < self.num_blocks, (
            f"cannot {verb} block {block_id}: it is not in [0, {self.num_blocks})"
        )
        assert self._ref_counts[block_id] > 0, f"cannot {verb} block {block_id}: it is free already"
