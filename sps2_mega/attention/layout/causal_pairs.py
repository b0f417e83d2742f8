"""Causal (query, key) pairs between ranges of positions, in closed form."""

from __future__ import annotations


def causal_pairs(queries: range, keys: range | None = None, *, window: int | None = None) -> int:
    """Count the pairs (i, j) with j <= i and, under a sliding window of tokens, j > i - window.

    `keys` defaults to all positions before the end of `queries`.
    """
    if keys is None:
        keys = range(queries.stop)
    count = _pairs(queries, keys)
    if window is not None:
        count -= _pairs(range(queries.start - window, queries.stop - window), keys)
    return count


def _pairs(queries: range, keys: range) -> int:
    """Query i sees i - keys.start + 1 of the keys while among them, and all of them behind."""
    first = max(queries.start, keys.start)
    inside = range(first, min(queries.stop, keys.stop))
    behind = range(max(queries.start, keys.stop), queries.stop)
    ramp = (inside.start + inside.stop + 1 - 2 * keys.start) * len(inside) // 2
    return ramp + len(behind) * len(keys)
