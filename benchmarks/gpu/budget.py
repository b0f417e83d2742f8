"""How long each part may take: shares of what is left, so that an early end leaves more for those
that follow."""

from __future__ import annotations

# Part -> seconds that it asks for on an H200, start-up included; in the order in which they run,
# what a decision depends on first.
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
    """Seconds for `part` when it and then `waiting` have `left_s` together: never more than twice
    what it asks for."""
    share = PARTS[part] / (PARTS[part] + sum(PARTS[name] for name in waiting))
    return min(left_s * share, 2.0 * PARTS[part])
