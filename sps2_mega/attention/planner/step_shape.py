"""Token and pair counts of a prefill step, per SP rank.

Pure ints from a step's layout; all estimates of exact transports are made from these counts alone.
Nothing here depends on how keys and queries meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sps2_mega.attention.layout.causal_pairs import causal_pairs
from sps2_mega.attention.layout.token_layout import PrefillLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """One prefill step on P SP ranks, with the heads of one TP rank.

    `queries[r]` new tokens and `keys[r]` new and cached ones lie on SP rank r; `pairs[r][p]` counts
    the causal (query, key) pairs of r's queries and p's keys, for one head. They lie in
    `calls[r][p]` rectangles or triangles with `partial_rows[r][p]` queries in sum; where these are
    not given, in one.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    pairs: tuple[tuple[int, ...], ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    calls: tuple[tuple[int, ...], ...] | None = None
    partial_rows: tuple[tuple[int, ...], ...] | None = None

    @property
    def size(self) -> int:
        """Number of SP ranks."""
        return len(self.queries)

    def partials(self, rank: int, keys: int) -> tuple[int, int]:
        """(calls, partial rows) of the queries of `rank` against the keys of rank `keys`."""
        if self.calls is None or self.partial_rows is None:
            return 1, self.queries[rank]
        return self.calls[rank][keys], self.partial_rows[rank][keys]


def step_shape(
    layout: PrefillLayout,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    window: int | None = None,
) -> StepShape:
    """Count a laid-out step.

    `num_heads` and `num_kv_heads` are those of one TP rank, `itemsize` the bytes of a number,
    `window` the model's sliding window in tokens.
    """
    size = len(layout.queries.counts)
    pairs, calls, rows = ([[0] * size for _ in range(size)] for _ in range(3))
    keys_of: dict[int, list[tuple[int, range]]] = {}
    for run in layout.keys.runs:
        keys_of.setdefault(run.sequence, []).append((run.rank, range(run.start, run.end)))
    for run in layout.queries.runs:
        for rank, keys in keys_of[run.sequence]:
            visible = causal_pairs(range(run.start, run.end), keys, window=window)
            pairs[run.rank][rank] += visible
            if visible:
                calls[run.rank][rank] += 1
                rows[run.rank][rank] += run.end - run.start
    return StepShape(
        queries=layout.queries.counts,
        keys=layout.keys.counts,
        pairs=tuple(map(tuple, pairs)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        itemsize=itemsize,
        calls=tuple(map(tuple, calls)),
        partial_rows=tuple(map(tuple, rows)),
    )


def busiest(rows: Sequence[Sequence[int]]) -> int:
    """The largest row sum; 0 where there are no rows."""
    return max((sum(row) for row in rows), default=0)
