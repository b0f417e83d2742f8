"""Visible pairs, attention FLOPs and keys to move of a CSA pattern, as exact integers.

All counts are read off the pieces, so they hold for any length, span, degree and placement; the
closed form for long prompts is `long_flops_ratio`. Bytes and seconds are counted in `by_level`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sps2_mega.attention.csa.key_blocks import key_ranges
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.attention.layout.causal_pairs import causal_pairs


@dataclass(frozen=True, slots=True)
class KeySlice:
    """Keys at positions `keys` of the KV heads `kv_heads`, numbered from the first one held."""

    keys: range
    kv_heads: range

    @property
    def num_rows(self) -> int:
        """(key, KV head) pairs: rows of K, and as many of V."""
        return len(self.keys) * len(self.kv_heads)


def visible_pairs(
    pattern: CSAPattern,
    *,
    prompt_len: int,
    queries: range,
    kv_heads: range,
    layer: int,
    keys: range | None = None,
) -> int:
    """Count the (query, key, KV head) triples to compute.

    FLOPs are 4 * H times this, times the query heads of one KV head (a multiply and an add, for the
    scores and again for the output).
    """
    pieces = csa_pieces(
        pattern, prompt_len=prompt_len, queries=queries, kv_heads=kv_heads, layer=layer, keys=keys
    )
    return sum(piece.num_pairs * len(piece.kv_heads) for piece in pieces)


def flops_ratio(pattern: CSAPattern, *, prompt_len: int, kv_heads: range, layer: int) -> float:
    """Attention FLOPs of a whole prompt relative to exact causal attention."""
    pairs = visible_pairs(
        pattern,
        prompt_len=prompt_len,
        queries=range(prompt_len),
        kv_heads=kv_heads,
        layer=layer,
    )
    return pairs / (causal_pairs(range(prompt_len)) * len(kv_heads))


def long_flops_ratio(
    group_sizes: Sequence[int], degrees: Sequence[int], *, sample_queries: bool
) -> float:
    """Limit of `flops_ratio` for many tokens in equal shards.

    Level l has groups of `group_sizes[l]` ranks. The levels are disjoint, so level l counts the
    ranks that it adds.
    """
    added = [
        outer - inner for inner, outer in itertools.pairwise([0, *group_sizes[: len(degrees)]])
    ]
    kept = [degree * degree if sample_queries else degree for degree in degrees]
    return sum(ranks / part for ranks, part in zip(added, kept, strict=True)) / group_sizes[-1]


def visible_keys(
    pattern: CSAPattern,
    *,
    prompt_len: int,
    queries: range,
    keys: range,
    kv_heads: range,
    layer: int,
) -> list[KeySlice]:
    """Keys that at least one query sees, each (key, KV head) in exactly one slice.

    They must travel from the rank that holds `keys` to the one that holds `queries`.
    """
    pieces = csa_pieces(
        pattern, prompt_len=prompt_len, queries=queries, kv_heads=kv_heads, layer=layer, keys=keys
    )
    # Heads seen by the same pieces need the same keys, so each set of heads is treated once.
    seen_by: dict[tuple[range, ...], list[int]] = {}
    for head in range(len(kv_heads)):
        seen = tuple(
            dict.fromkeys(
                part
                for piece in pieces
                if head in piece.kv_heads
                for part in key_ranges(piece.keys)
            )
        )
        seen_by.setdefault(seen, []).append(head)
    heads_of: dict[range, list[int]] = {}
    for seen, heads in seen_by.items():
        for part in _disjoint(seen):
            heads_of.setdefault(part, []).extend(heads)
    return [
        KeySlice(part, members)
        for part, heads in sorted(heads_of.items(), key=lambda item: (item[0].start, item[1]))
        for members in _as_ranges(sorted(heads))
    ]


def _disjoint(ranges: Sequence[range]) -> list[range]:
    """The union of arithmetic progressions, as progressions without a common element."""
    cuts = sorted({edge for part in ranges for edge in (part.start, part[-1] + 1)})
    union: list[range] = []
    open_at: dict[
        tuple[int, int], int
    ] = {}  # (step, remainder) -> its place in union, if it goes on
    for low, high in itertools.pairwise(cuts):
        classes = {
            (p.step, p.start % p.step) for p in ranges if p.start <= low and high - 1 <= p[-1]
        }
        still_open: dict[tuple[int, int], int] = {}
        for step, rest in _disjoint_classes(classes):
            part = range(low + (rest - low) % step, high, step)
            place = open_at.get((step, rest))
            if place is not None:
                union[place] = range(union[place].start, high, step)
            elif part:
                place = len(union)
                union.append(part)
            if place is not None:
                still_open[step, rest] = place
        open_at = still_open
    return union


def _disjoint_classes(classes: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Residue classes (step, remainder) with the same union and nothing in common."""
    kept = [
        (step, rest)
        for step, rest in classes
        if not any(s < step and step % s == 0 and rest % s == r for s, r in classes)
    ]
    if len(kept) <= 1:
        return kept
    period = math.lcm(*(step for step, _ in kept))
    return [
        (period, number)
        for number in range(period)
        if any(number % step == rest for step, rest in kept)
    ]


def _as_ranges(numbers: list[int]) -> list[range]:
    """Ascending numbers as one range where they are evenly spaced, else one by one."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    whole = range(numbers[0], numbers[-1] + 1, step)
    return [whole] if list(whole) == numbers else [range(n, n + 1) for n in numbers]
