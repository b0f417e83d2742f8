"""Cutting the queries of a step, and the heads of a rank, into parts of about equal work: pure
ints.

    rank 0   [ a | b  | c  |  d  ]        part 0 = every rank's tokens a, part 1 = every rank's tokens b, ..
    rank 1   [ a | b  | c  |  d  ]        so each part moves the same share of each rank's bytes

A query costs as many keys as it sees, so later parts have fewer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sps2_mega.attention.layout.heads import group_heads, split_heads
from sps2_mega.attention.layout.token_layout import TokenLayout
from sps2_mega.attention.pipeline.settings import (
    PipelineSettings,
    SmallestPart,
    num_micro_batches,
)


@dataclass(frozen=True, slots=True)
class PartRun:
    """Queries [start, end) of `sequence`, from `row` on in the part's tokens."""

    sequence: int
    start: int
    end: int
    row: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.end - self.start)


@dataclass(frozen=True, slots=True)
class QueryPart:
    """`local[r]` are rank r's tokens of the part. `index` brings them from rank-major into sequence
    order, in which `runs` counts rows; None when the orders agree."""

    local: tuple[slice, ...]
    index: np.ndarray | None
    runs: tuple[PartRun, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens on each rank; may be 0 on all of them."""
        return tuple(part.stop - part.start for part in self.local)


def cut_queries(
    queries: TokenLayout, num_parts: int, *, window: int | None = None
) -> list[QueryPart]:
    """All queries in `num_parts` parts that cost about the same, at the same fraction of each
    rank's local tokens."""
    bounds = _bounds(queries, num_parts, window)
    return [
        _part(queries, tuple(slice(cuts[p], cuts[p + 1]) for cuts in bounds))
        for p in range(num_parts)
    ]


def seen_keys(queries: TokenLayout, *, window: int | None = None) -> int:
    """(query, key) pairs of causal attention over all sequences."""
    pairs = 0
    for first, last in zip(queries.first, queries.last, strict=True):
        pairs += _pairs_before(last, window) - _pairs_before(first, window)
    return pairs


def kv_head_groups(
    settings: PipelineSettings,
    queries: TokenLayout,
    *,
    moved_rows: int,
    num_heads: int,
    num_kv_heads: int,
    row_bytes: int,
    head_dim: int,
    window: int | None,
    smallest: SmallestPart,
) -> list[range]:
    """KV heads in groups of which each is a micro-batch, for transports that are cut by KV heads
    alone. From what all ranks know alike, the mean over ranks; `moved_rows` are rows of one head
    that all ranks together give to others, `row_bytes` what one of them takes."""
    size = len(queries.counts)
    wanted = num_micro_batches(
        settings,
        num_bytes=moved_rows * (size - 1) // size * row_bytes,
        flops=4 * seen_keys(queries, window=window) * num_heads * head_dim // size,
        smallest=smallest,
    )
    groups = min(wanted, num_kv_heads)
    return [
        range(num_kv_heads * g // groups, num_kv_heads * (g + 1) // groups) for g in range(groups)
    ]


def head_groups(
    num_heads: int, num_kv_heads: int, num_ranks: int, num_groups: int
) -> list[list[tuple[range, range]]]:
    """[group][rank] -> (query heads, KV heads). Each rank's heads are cut where its KV head
    changes; a rank with fewer KV heads than groups has nothing in some of them."""
    repeats = num_heads // num_kv_heads
    groups: list[list[tuple[range, range]]] = [[] for _ in range(num_groups)]
    for heads, _ in split_heads(num_heads, num_kv_heads, num_ranks):
        pieces = group_heads(heads, repeats)
        for g, group in enumerate(groups):
            own = pieces[len(pieces) * g // num_groups : len(pieces) * (g + 1) // num_groups]
            if own:
                query_heads = range(own[0][0].start, own[-1][0].stop)
                group.append((query_heads, range(own[0][1], own[-1][1] + 1)))
            else:
                group.append((range(0), range(0)))
    return groups


def most_kv_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> int:
    """KV heads of the rank that has most."""
    return max(len(kv_heads) for _, kv_heads in split_heads(num_heads, num_kv_heads, num_ranks))


def _pairs_before(position: int, window: int | None) -> int:
    """Keys seen by the queries [0, position)."""
    if window is None or position <= window:
        return position * (position + 1) // 2
    return window * (window + 1) // 2 + (position - window) * window


def _bounds(queries: TokenLayout, num_parts: int, window: int | None) -> list[list[int]]:
    """Where each rank's local tokens are cut: num_parts + 1 bounds per rank."""
    steps = max(64, 8 * num_parts)
    fractions = np.arange(steps + 1) / steps
    cost_at = np.zeros(steps + 1)
    cuts_at = []
    for rank, count in enumerate(queries.counts):
        cuts = np.floor(fractions * count + 0.5).astype(np.int64)
        cuts_at.append(cuts)
        if num_parts > 1:
            cost_at += np.concatenate(([0.0], np.cumsum(_costs(queries, rank, window))))[cuts]
    targets = cost_at[-1] * np.arange(1, num_parts) / num_parts
    inner = [int(np.abs(cost_at - target).argmin()) for target in targets]
    chosen = [0, *inner, steps]
    return [[int(cuts[at]) for at in chosen] for cuts in cuts_at]


def _costs(queries: TokenLayout, rank: int, window: int | None) -> np.ndarray:
    """Keys seen by each local token of a rank."""
    seen = np.zeros(queries.counts[rank])
    for run in queries.local_runs(rank):
        seen[run.local] = np.arange(run.start, run.end) + 1.0
    return seen if window is None else np.minimum(seen, window)


def _part(queries: TokenLayout, local: Sequence[slice]) -> QueryPart:
    offsets = np.concatenate(([0], np.cumsum([part.stop - part.start for part in local])))
    runs: list[PartRun] = []
    pieces = []
    row = 0
    for run in queries.runs:  # in sequence order
        kept = local[run.rank]
        low = max(run.local.start, kept.start)
        high = min(run.local.stop, kept.stop)
        if low >= high:
            continue
        start = run.start + low - run.local_start
        end = start + high - low
        pieces.append(np.arange(low, high) + (offsets[run.rank] - kept.start))
        if runs and runs[-1].sequence == run.sequence and runs[-1].end == start:
            runs[-1] = PartRun(run.sequence, runs[-1].start, end, runs[-1].row)
        else:
            runs.append(PartRun(run.sequence, start, end, row))
        row += high - low
    index = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    in_order = np.array_equal(index, np.arange(len(index)))
    return QueryPart(tuple(local), None if in_order else index, tuple(runs))
