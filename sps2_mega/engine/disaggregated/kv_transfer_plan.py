"""Routes of keys and values from prefill ranks to decode ranks: pure index work.

Both pools keep tokens in blocks of the same size, but place blocks on their own SP ranks and cut KV
heads by their own TP degree. A route is therefore rows times heads:

    rows    tokens of a block, from the SP rank that prefilled it to the one that will hold it
    heads   the heads that sender and receiver share; of several senders of a head one is chosen

    prefill tp=2 (heads 0-1 | 2-3), decode tp=4 (0 | 1 | 2 | 3):   tp 0 -> 0, 1    tp 1 -> 2, 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sps2_mega.attention.csa.spans import local_kv_heads


@dataclass(frozen=True, slots=True)
class Placement:
    """Blocks of a sequence in one pool: block i is `block_ids[i]` on SP rank `block_ranks[i]`."""

    block_ranks: Sequence[int]
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class HeadCut:
    """`count` KV heads that TP rank `src` sends to TP rank `dst`, with the index of the first one
    among the local heads of each."""

    src: int
    dst: int
    src_start: int
    dst_start: int
    count: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens that travel from one SP rank to another: their cache slots on both."""

    src_slots: np.ndarray
    dst_slots: np.ndarray


def head_cuts(num_kv_heads: int, *, src_tp: int, dst_tp: int) -> list[HeadCut]:
    """Cuts that bring every head of every receiving TP rank exactly once.

    Sending ranks that share a head take turns in sending it.
    """
    cuts: list[HeadCut] = []
    for dst in range(dst_tp):
        wanted = local_kv_heads(num_kv_heads, tp_rank=dst, tp=dst_tp)
        for index, head in enumerate(wanted):
            holders = [
                src
                for src in range(src_tp)
                if head in local_kv_heads(num_kv_heads, tp_rank=src, tp=src_tp)
            ]
            src = holders[dst % len(holders)]
            start = local_kv_heads(num_kv_heads, tp_rank=src, tp=src_tp).index(head)
            last = cuts[-1] if cuts else None
            if last is not None and (last.src, last.dst) == (src, dst):
                # Both pools number heads without gaps, so neighbours stay neighbours.
                cuts[-1] = HeadCut(src, dst, last.src_start, last.dst_start, last.count + 1)
            else:
                cuts.append(HeadCut(src, dst, start, index, 1))
    return cuts


def rows_from(
    src_rank: int, src: Placement, dst: Placement, *, first: int, end: int, block_size: int
) -> dict[int, Rows]:
    """Rows of tokens [first, end) that prefill SP rank `src_rank` sends, by receiving SP rank."""
    positions = np.arange(first, end)
    blocks, offsets = positions // block_size, positions % block_size
    mine = np.asarray(src.block_ranks)[blocks] == src_rank
    receivers = np.asarray(dst.block_ranks)[blocks]
    src_slots = np.asarray(src.block_ids)[blocks] * block_size + offsets
    dst_slots = np.asarray(dst.block_ids)[blocks] * block_size + offsets
    return {
        int(receiver): Rows(src_slots[chosen], dst_slots[chosen])
        for receiver in np.unique(receivers[mine])
        for chosen in [mine & (receivers == receiver)]
    }


def rows_per_rank(dst: Placement, *, first: int, end: int, block_size: int) -> dict[int, int]:
    """Number of tokens [first, end) on each decode SP rank; `first` is a block's first token."""
    counts: dict[int, int] = {}
    for start in range(first, end, block_size):
        rank = dst.block_ranks[start // block_size]
        counts[rank] = counts.get(rank, 0) + min(block_size, end - start)
    return counts
