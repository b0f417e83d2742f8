"""Placement of new blocks on SP ranks: pure functions of block counts.

This module chooses ranks only; ids come from each rank's allocator. Any placement gives the same
result, so these rules balance load: memory, causal attention work, and the linear layers in decode.

    6 blocks, 2 ranks   contiguous  0 0 0 1 1 1      zigzag  0 0 1 1 1 0      striped  0 1 0 1 0 1
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Layout = Literal["contiguous", "zigzag", "striped"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Placement of a prompt's new blocks: over all ranks by `layout`, or all on one `rank`.

    `rank` takes them if it has room. `stripes` are the consecutive blocks on one rank in layout
    `striped`, for each turn; the last number holds for all later turns.
    """

    layout: Layout
    stripes: tuple[int, ...] = (1,)
    rank: int | None = None


def shard_sizes(num_blocks: int, free: Sequence[int]) -> list[int] | None:
    """Blocks per SP rank, as equal as `free[rank]` allows; None if there are too few free blocks.

    A remainder goes to the ranks with most free blocks, then to the lowest ranks.
    """
    assert num_blocks >= 0, f"num_blocks must be >= 0, got {num_blocks}"
    if num_blocks > sum(free):
        return None
    level = _fill_level(num_blocks, free)
    sizes = [min(blocks, level) for blocks in free]
    extra = num_blocks - sum(sizes)
    roomy = sorted(
        (rank for rank in range(len(free)) if free[rank] > level), key=lambda r: (-free[r], r)
    )
    for rank in roomy[:extra]:
        sizes[rank] += 1
    return sizes


def spread_block_ranks(num_blocks: int, free: Sequence[int], spread: Spread) -> list[int] | None:
    """SP rank of each block of a prompt, in block order; None if it does not fit."""
    if spread.rank is not None and free[spread.rank] >= num_blocks:
        return [spread.rank] * num_blocks
    return prompt_block_ranks(num_blocks, free, spread.layout, spread.stripes)


def prompt_block_ranks(
    num_blocks: int, free: Sequence[int], layout: Layout, stripes: Sequence[int] = (1,)
) -> list[int] | None:
    """SP rank of each block of a prompt, in block order; None if it does not fit.

    `contiguous`: each rank has one run of blocks, in rank order. `zigzag`: rank r of P has runs r
    and 2P-1-r of 2P, an early and a late one, so that causal attention costs every rank about the
    same. `striped`: ranks take turns, `stripes[t]` blocks each in turn t and `stripes[-1]` in all
    later ones, so that each chunk of a prompt is on all ranks.
    """
    sizes = shard_sizes(num_blocks, free)
    if sizes is None:
        return None
    if layout == "contiguous":
        runs = list(enumerate(sizes))
    elif layout == "striped":
        runs = [
            (rank, min(stripe, size - first))
            for first, stripe in _turns(stripes, max(sizes))
            for rank, size in enumerate(sizes)
            if first < size
        ]
    else:
        assert layout == "zigzag", f"layout must be contiguous, zigzag or striped, got {layout!r}"
        early = [(rank, size - size // 2) for rank, size in enumerate(sizes)]
        late = [(rank, size // 2) for rank, size in enumerate(sizes)]
        runs = early + late[::-1]
    return [rank for rank, size in runs for _ in range(size)]


def next_block_rank(num_tails: Sequence[int], free: Sequence[int]) -> int | None:
    """SP rank for the block that a decoding sequence opens; None if no rank has a free block.

    `num_tails[rank]` counts the other running sequences whose last block is there. The
    fewest win, because the rank of the last block runs that sequence's linear layers; ties
    go to most free blocks, then to the lowest rank.
    """
    candidates = [rank for rank in range(len(free)) if free[rank] > 0]
    if not candidates:
        return None
    return min(candidates, key=lambda rank: (num_tails[rank], -free[rank], rank))


def _turns(stripes: Sequence[int], num_blocks: int) -> Iterator[tuple[int, int]]:
    """(blocks before, blocks in it) of each turn, until every rank with room has `num_blocks`."""
    first = 0
    for stripe in itertools.chain(stripes, itertools.repeat(stripes[-1])):
        if first >= num_blocks:
            return
        yield first, stripe
        first += stripe


def _fill_level(num_blocks: int, free: Sequence[int]) -> int:
    """Largest level with sum(min(blocks, level)) <= num_blocks, for num_blocks <= sum(free)."""
    left, level = num_blocks, 0
    ranks_left = len(free)
    for blocks in sorted(free):
        if left < (blocks - level) * ranks_left:
            return level + left // ranks_left
        left -= (blocks - level) * ranks_left
        level = blocks
        ranks_left -= 1
    return level
