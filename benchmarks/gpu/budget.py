"""Time limits of the parts, as shares of the remaining time: an early end helps later parts."""

from __future__ import annotations

# Part -> seconds on an H200, start-up included, in running order: what decisions depend on first.
PARTS: dict[str, float] = {
    "ceilings": 25.0,
    "decode": 60.0,
    "prefill": 130.0,
    "host_time": 35.0,
    "attention": 60.0,
    "prefill_transformers": 80.0,
    "rank_share": 45.0,
    "decode_transformers": 130.0,
}


def limit_s(part: str, waiting: list[str], left_s: float) -> float:
    """Seconds for `part` out of `left_s`, which `waiting` parts share with it.

    It gets at most twice what it asks for.
    """
    share = PARTS[part] / (PARTS[part] + sum(PARTS[name] for name in waiting))
    return min(left_s * share, 2.0 * PARTS[part])
