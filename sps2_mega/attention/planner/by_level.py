"""Transport of each SP level in a sparse prefill step, from visible rows and pairs: the fastest.

    computing      attention of the busiest rank, its merges and copies; its own keys come first
    on the links   bytes between ranks, and the latencies of every part of an exchange
    the layer      both, in the pipeline's stage order (`overlap`)

As `exact`, a pure function of the step and of what was measured, so that all ranks choose alike.
Visible rows come from `visible_rows`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sps2_mega.attention.layout.heads import split_heads
from sps2_mega.attention.planner.link_time import link_seconds, sockets_s
from sps2_mega.attention.planner.overlap import level_layer
from sps2_mega.attention.planner.traffic import Matrix
from sps2_mega.attention.planner.visible_rows import Pair
from sps2_mega.parallel.machine import Machine
from sps2_mega.parallel.topology import group_sizes_of, level_of

# A ring sends as much as a gather and holds less of it, at more latency: it saves memory alone.
CANDIDATES: tuple[str, ...] = ("gather", "pass_q", "ulysses")
_MESSAGES = {"gather": 1, "pass_q": 2, "ulysses": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelChoice:
    """The fastest combination of transports, innermost level first, and seconds of each."""

    transports: tuple[str, ...]
    seconds: dict[tuple[str, ...], float]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelCost:
    """Seconds of one layer by one combination of transports.

    `compute_s` is all that the busiest rank computes, `own_s` of it attention to its own keys;
    `latency_s` are the messages of one part of the exchanges.
    """

    own_s: float
    compute_s: float
    travel_s: float
    latency_s: float


def choose_levels(
    visible: dict[tuple[int, int], Pair],
    machine: Machine,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    parts: int | None,
) -> LevelChoice:
    """The fastest combination; among equals the one with `gather` innermost.

    Args:
        visible: as `visible_between` found it, by (rank of queries, rank of keys).
        num_heads: query heads of one TP rank; `num_kv_heads` likewise.
        itemsize: bytes of a number of q, k and v.
        parts: number of parts of each exchange (`levels.kv_parts`), None where nothing overlaps.
    """
    costs = level_costs(
        visible,
        machine,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        itemsize=itemsize,
    )
    layers = {
        names: level_layer(
            own_s=cost.own_s,
            far_s=cost.compute_s - cost.own_s,
            travel_s=cost.travel_s,
            latency_s=cost.latency_s * (parts or 1),
            parts=parts,
            on_cpu=machine.on_cpu,
        )
        for names, cost in costs.items()
    }
    seconds = {names: layer.total_s for names, layer in layers.items()}
    best = min(seconds, key=seconds.__getitem__)
    reason = (
        f"{_ms(seconds[best])} per layer (communication {_ms(layers[best].comm_s)}, "
        f"attention {_ms(layers[best].compute_s)})"
    )
    for found, names in sorted((found, names) for names, found in seconds.items())[:3]:
        if names != best:
            reason += f"; {','.join(names)} {_ms(found)}"
    return LevelChoice(transports=best, seconds=seconds, reason=reason)


def level_costs(
    visible: dict[tuple[int, int], Pair],
    machine: Machine,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
) -> dict[tuple[str, ...], LevelCost]:
    """Cost of one layer by each combination of transports, before anything overlaps."""
    heads = _Heads(num_heads, num_kv_heads, head_dim * itemsize)
    group_sizes = group_sizes_of(machine.sp_levels)
    latency_s = max(link.latency_s for link in machine.links)
    work_s = {
        name: machine.work_s.get(name, messages * latency_s) for name, messages in _MESSAGES.items()
    }
    pair_s = head_dim * 4 / machine.flops_per_s * heads.per_kv_head
    own_s = [0.0] * group_sizes[-1]
    for (a, b), pair in visible.items():
        if a == b:
            own_s[a] += pair.pairs * pair_s
    costs = {}
    for names in itertools.product(CANDIDATES, repeat=len(machine.sp_levels)):
        moved, computed = _spread(visible, names, group_sizes, heads)
        busy_s = [
            head_dim * (done.pairs * 4 / machine.flops_per_s + done.merged_rows * machine.merge_s)
            + handled
            for done, handled in zip(computed, _handling_s(moved, itemsize, machine), strict=True)
        ]
        compute_s = _shared_s(busy_s, machine)
        costs[names] = LevelCost(
            own_s=min(compute_s, _shared_s(own_s, machine)),
            compute_s=compute_s,
            travel_s=link_seconds(moved, machine),
            latency_s=sum(work_s[name] for name in names),
        )
    return costs


def _shared_s(busy_s: Sequence[float], machine: Machine) -> float:
    """Seconds until all ranks are done, each `busy_s[r]` while all compute.

    The last one left has the share of the cores of those that have finished.
    """
    return max(sum(busy_s) / len(busy_s), max(busy_s) / machine.ranks_per_core)


def _handling_s(moved: Matrix, itemsize: int, machine: Machine) -> list[float]:
    """Seconds of each rank beside attention.

    Rows are copied before they leave and after they arrive, and between CPUs they pass through
    sockets.
    """
    sent, received = map(sum, moved), map(sum, zip(*moved, strict=True))
    copy_s = 2 * machine.copy_s / itemsize
    copied_s = [sum(both) * copy_s for both in zip(sent, received, strict=True)]
    if not machine.on_cpu:
        return copied_s
    return list(map(sum, zip(copied_s, sockets_s(moved, itemsize, machine), strict=True)))


@dataclass(frozen=True, slots=True)
class _Heads:
    num_heads: int
    num_kv_heads: int
    row_bytes: int  # of one head of one token

    @property
    def per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(slots=True)
class _Computed:
    """(query, key, head) triples that one rank computes, and (query, head) rows that it merges."""

    pairs: float = 0.0
    merged_rows: float = 0.0

    def add(self, pair: Pair, heads_per_kv: float) -> None:
        self.pairs += pair.pairs * heads_per_kv
        self.merged_rows += pair.partial_rows * heads_per_kv


def _spread(
    visible: dict[tuple[int, int], Pair],
    names: Sequence[str],
    group_sizes: Sequence[int],
    heads: _Heads,
) -> tuple[Matrix, list[_Computed]]:
    """Bytes from rank to rank, and what each rank computes, as `levels.exchanges` deals it."""
    size, row = group_sizes[-1], heads.row_bytes
    per_kv_head = heads.per_kv_head
    moved: Matrix = [[0] * size for _ in range(size)]
    computed = [_Computed() for _ in range(size)]
    # Under ulysses a row goes once to whoever computes its heads, however many ranks see it or are
    # seen by it.
    dealt_queries: dict[tuple[int, int], int] = {}
    dealt_keys: dict[tuple[int, int], int] = {}
    for (a, b), pair in visible.items():
        level = level_of(a, b, group_sizes)
        name = names[level - 1] if level else "own"
        queries, keys = pair.query_rows * per_kv_head, 2 * pair.key_rows
        if name in ("own", "gather"):
            computed[a].add(pair, per_kv_head)
            moved[b][a] += keys * row if level else 0
        elif name == "pass_q":
            computed[a].merged_rows += queries  # when the partials are back
            computed[b].add(pair, per_kv_head)
            moved[a][b] += queries * row
            moved[b][a] += queries * (row + 4)
        else:
            for at, (mine, _) in _sharing(a, level, group_sizes, heads):
                computed[at].add(pair, per_kv_head * len(mine) / heads.num_heads)
            dealt_queries[a, level] = max(queries, dealt_queries.get((a, level), 0))
            dealt_keys[b, level] = max(keys, dealt_keys.get((b, level), 0))
    for (a, level), queries in dealt_queries.items():
        computed[a].merged_rows += queries
        for at, (mine, _) in _sharing(a, level, group_sizes, heads):
            share = queries * len(mine) / heads.num_heads
            moved[a][at] += int(share * row)
            moved[at][a] += int(share * (row + 4))
    for (b, level), keys in dealt_keys.items():
        for at, (_, kv) in _sharing(b, level, group_sizes, heads):
            moved[b][at] += int(keys * row * len(kv) / heads.num_kv_heads)
    for rank in range(size):
        moved[rank][rank] = 0
    return moved, computed


def _sharing(
    rank: int, level: int, group_sizes: Sequence[int], heads: _Heads
) -> Iterator[tuple[int, tuple[range, range]]]:
    """Ranks of the level's group around `rank`, and the heads of each."""
    size = group_sizes[level]
    shares = split_heads(heads.num_heads, heads.num_kv_heads, size)
    return enumerate(shares, start=rank // size * size)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
