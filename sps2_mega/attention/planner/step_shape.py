"""What a prefill step asks of its transport, in counts: tokens per sp rank and visible pairs
between ranks.

Pure ints, made from the layout of a step; `traffic` and `planner` work on these counts alone.
Nothing here depends on how keys and queries meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sps2_mega.attention.layout.token_layout import PrefillLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """One prefill step on P sp ranks, with the heads of one TP rank.

    `queries[r]` new tokens and `keys[r]` new and cached ones lie on sp rank r; `pairs[r][p]` counts
    the (query, key) pairs of r's queries and p's keys that causal attention looks at, for one head.
    They lie in `calls[r][p]` rectangles or triangles with `partial_rows[r][p]` queries in sum;
    where these are not given, in one.
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
        """Number of sp ranks."""
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
    """The shape of a laid-out step; `num_heads` and `num_kv_heads` are those of one TP rank,
    `itemsize` the bytes of a number, `window` the model's sliding window in tokens."""
    size = len(layout.queries.counts)
    pairs, calls, rows = ([[0] * size for _ in range(size)] for _ in range(3))
    keys_of: dict[int, list[tuple[int, range]]] = {}
    for run in layout.keys.runs:
        keys_of.setdefault(run.sequence, []).append((run.rank, range(run.start, run.end)))
    for run in layout.queries.runs:
        for rank, keys in keys_of[run.sequence]:
            visible = visible_pairs(range(run.start, run.end), keys, window)
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


def visible_pairs(queries: range, keys: range, window: int | None = None) -> int:
    """How many (i, j) of the two ranges of positions have j <= i, and j > i - window with a sliding
    window."""
    count = _causal_pairs(queries, keys)
    if window is not None:
        count -= _causal_pairs(range(queries.start - window, queries.stop - window), keys)
    return count


def busiest(rows: Sequence[Sequence[int]]) -> int:
    """The largest row sum; 0 where there are no rows."""
    return max((sum(row) for row in rows), default=0)


def _causal_pairs(queries: range, keys: range) -> int:
    """Query i sees i - keys.start + 1 of the keys while it is among them, and all of them
    behind."""
    first = max(queries.start, keys.start)
    inside = range(first, min(queries.stop, keys.stop))
    behind = range(max(queries.start, keys.stop), queries.stop)
    ramp = (inside.start + inside.stop + 1 - 2 * keys.start) * len(inside) // 2
    return ramp + len(behind) * len(keys)
