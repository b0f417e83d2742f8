"""Shares of attention heads: dealt to ranks, and cut where the KV head changes. Pure ints."""

from __future__ import annotations


def split_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> list[tuple[range, range]]:
    """Deal query heads to ranks: (query heads, KV heads they use) of each rank.

    Query heads of a rank are contiguous and as equal in number as possible, maybe none.
    """
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


def head_groups(
    num_heads: int, num_kv_heads: int, num_ranks: int, num_groups: int
) -> list[list[tuple[range, range]]]:
    """Group the heads of each rank: [group][rank] -> (query heads, KV heads).

    Each rank's heads are cut where its KV head changes. A rank with fewer KV heads than groups has
    none in some groups.
    """
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
    """Return the largest number of KV heads on a rank."""
    return max(len(kv_heads) for _, kv_heads in split_heads(num_heads, num_kv_heads, num_ranks))
