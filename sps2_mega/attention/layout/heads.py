"""Dealing attention heads to ranks, and cutting ranges of them where the KV head changes. Pure
ints."""

from __future__ import annotations


def split_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> list[tuple[range, range]]:
    """Query heads of each rank (contiguous, as equal as possible, maybe none) and the KV heads they
    use."""
    repeats = num_heads // num_kv_heads
    shares = []
    for rank in range(num_ranks):
        heads = range(rank * num_heads // num_ranks, (rank + 1) * num_heads // num_ranks)
        last = (heads[-1] // repeats + 1) if heads else heads.start // repeats
        shares.append((heads, range(heads.start // repeats, last)))
    return shares


def group_heads(heads: range, repeats: int) -> list[tuple[range, int]]:
    """Cut a range of query heads where the KV head changes: (query heads, KV head) pieces."""
    pieces = []
    start = heads.start
    while start < heads.stop:
        stop = min(heads.stop, (start // repeats + 1) * repeats)
        pieces.append((range(start, stop), start // repeats))
        start = stop
    return pieces
