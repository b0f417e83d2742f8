"""Index of full blocks by the prefix they hold: a forest of block digests, one per CSA spans.

This module decides what is findable. Holders, eviction order and empty blocks belong to the
allocators; `scheduler.prefix_sharing` decides what may be shared.

    spans (256,)    d0 -- d1 -- d2         request A: d0 d1 d2
                           `--- d2'        request B: d0 d1 d2'
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# CSA spans that a prompt got from the ranks; None if spans are configured or nothing is sparse.
Spans = tuple[int, ...] | None


@dataclass(slots=True, eq=False)
class CachedBlock:
    """A findable block: `block_id` on SP rank `sp_rank` holds the content that `digest` names."""

    digest: bytes
    spans: Spans
    sp_rank: int
    block_id: int
    parent: CachedBlock | None
    children: set[CachedBlock] = field(default_factory=set)


class PrefixCache:
    """Findable blocks: if a block is findable, so are all blocks before it.

    No block is findable under two names.
    """

    __slots__ = ("_by_place", "_trees")

    def __init__(self) -> None:
        self._trees: dict[Spans, dict[bytes, CachedBlock]] = {}
        self._by_place: dict[tuple[int, int], CachedBlock] = {}

    def __len__(self) -> int:
        return len(self._by_place)

    def find(self, chain: Sequence[bytes], accepts: Callable[[Spans], bool]) -> list[CachedBlock]:
        """Longest findable start of `chain` under any spans that `accepts` allows."""
        best: list[CachedBlock] = []
        for spans, tree in self._trees.items():
            if len(chain) > len(best) and chain[len(best)] in tree and accepts(spans):
                best = [tree[digest] for digest in chain[: self._num_findable(tree, chain)]]
        return best

    def num_findable(self, chain: Sequence[bytes], spans: Spans) -> int:
        """Number of blocks from the start of `chain` that are findable under just these spans."""
        return self._num_findable(self._trees.get(spans, {}), chain)

    def add(self, chain: Sequence[bytes], index: int, spans: Spans, place: tuple[int, int]) -> None:
        """Make the block at `place` (SP rank, block id) findable as block `index` of `chain`.

        All blocks before it must be findable.
        """
        tree = self._trees.setdefault(spans, {})
        digest = chain[index]
        assert digest not in tree and place not in self._by_place, f"{place} is findable already"
        parent = tree[chain[index - 1]] if index else None
        block = CachedBlock(digest, spans, *place, parent)
        if parent is not None:
            parent.children.add(block)
        tree[digest] = self._by_place[place] = block

    def remove(self, place: tuple[int, int]) -> list[tuple[int, int]]:
        """Forget the block at a place and all blocks after it; return the places of all of them."""
        block = self._by_place[place]
        if block.parent is not None:
            block.parent.children.remove(block)
        removed, stack = [], [block]
        tree = self._trees[block.spans]
        while stack:
            block = stack.pop()
            stack.extend(block.children)
            del tree[block.digest]
            del self._by_place[block.sp_rank, block.block_id]
            removed.append((block.sp_rank, block.block_id))
        if not tree:
            del self._trees[block.spans]
        return removed

    def places(self) -> set[tuple[int, int]]:
        """(SP rank, block id) of every findable block."""
        return set(self._by_place)

    def check_integrity(self) -> None:
        """Recount all blocks.

        Raises an AssertionError if the two views differ or a block is findable without its prefix.
        """
        blocks = [block for tree in self._trees.values() for block in tree.values()]
        assert len(blocks) == len(self._by_place), "a findable block has no place, or two"
        for block in blocks:
            assert self._by_place.get((block.sp_rank, block.block_id)) is block, "a place is wrong"
            tree = self._trees[block.spans]
            assert tree[block.digest] is block, "a block has the name of another"
            if block.parent is not None:
                assert tree.get(block.parent.digest) is block.parent, "a block lost its prefix"
                assert block in block.parent.children, "a block is not among its parent's children"
        children = sum(len(block.children) for block in blocks)
        assert children == sum(block.parent is not None for block in blocks), "a child is left over"

    @staticmethod
    def _num_findable(tree: dict[bytes, CachedBlock], chain: Sequence[bytes]) -> int:
        # The findable blocks are a start of the chain, so bisection finds its end.
        return bisect_left(range(len(chain)), True, key=lambda index: chain[index] not in tree)
