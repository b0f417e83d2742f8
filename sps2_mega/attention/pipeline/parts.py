"""Micro-batches of about equal cost: parts of a step's queries, or groups of KV heads. Pure ints.

    rank 0   [  a  |  b  | c | d ]        part 0 = tokens a of every rank, part 1 = tokens b, ..
    rank 1   [  a  |  b  | c | d ]        so each part moves the same share of each rank's bytes

A query costs as many keys as it sees, so later parts have fewer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sps2_mega.attention.layout.causal_pairs import causal_pairs
from sps2_mega.attention.pipeline.micro_batches import num_micro_batches

if TYPE_CHECKING:
    from sps2_mega.attention.layout.token_layout import TokenLayout
    from sps2_mega.attention.pipeline.micro_batches import SmallestPart
    from sps2_mega.attention.pipeline.settings import PipelineSettings


@dataclass(frozen=True, slots=True)
class PartRun:
    """Queries [start, end) of `sequence`; the first one is token `row` of the part."""

    sequence: int
    start: int
    end: int
    row: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.end - self.start)


@dataclass(frozen=True, slots=True)
class QueryPart:
    """One part of the queries; `local[r]` are the tokens of rank r.

    `index` orders them from rank-major to sequence order, in which `runs` count rows; None where
    the orders agree.
    """

    local: tuple[slice, ...]
    index: np.ndarray | None
    runs: tuple[PartRun, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens on each rank; may be 0 on all."""
        return tuple(part.stop - part.start for part in self.local)


def cut_queries(
    queries: TokenLayout, num_parts: int, *, window: int | None = None
) -> list[QueryPart]:
    """Cut all queries into `num_parts` parts that cost about the same.

    Every rank is cut at the same fractions of its local tokens.
    """
    bounds = _bounds(queries, num_parts, window)
    return [
        _part(queries, tuple(slice(cuts[p], cuts[p + 1]) for cuts in bounds))
        for p in range(num_parts)
    ]


def seen_keys(queries: TokenLayout, *, window: int | None = None) -> int:
    """Count the (query, key) pairs of causal attention over all sequences."""
    bounds = zip(queries.first, queries.last, strict=True)
    return sum(causal_pairs(range(first, last), window=window) for first, last in bounds)


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
    """Group KV heads into micro-batches, for transports that are cut by KV heads alone.

    It takes the mean over ranks, so that all ranks group alike.

    Args:
        settings: Pipeline of the job.
        queries: Queries of the step.
        moved_rows: Rows of one head that all ranks together send.
        num_heads: Query heads of this TP rank.
        num_kv_heads: KV heads of this TP rank.
        row_bytes: Bytes of such a row.
        head_dim: Elements of a head.
        window: Sliding window in tokens, or None.
        smallest: Bytes and FLOPs below which a micro-batch does not pay.
    """
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


def _bounds(queries: TokenLayout, num_parts: int, window: int | None) -> list[list[int]]:
    """Return where each rank's local tokens are cut: num_parts + 1 bounds per rank."""
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
    """Count the keys seen by each local token of a rank."""
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
