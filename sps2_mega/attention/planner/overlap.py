"""Seconds of one pipelined attention layer: the engine's own stage order, played on three clocks.

Inputs come in over one stream, results return over another, and attention computes, each in the
order of `attention.pipeline.schedule`; a wait lasts until what was posted is there. Both streams
share one link, so a layer takes no less than all its traffic. The planner and the simulator get
their layers from here; how long each piece takes is theirs to say.

    in        |k0 q0 v0|k1 q1 v1|
    compute            |   0    |   1    |
    out                         |  o0  | |  o1  |          exposed = end - sum of compute
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from sps2_mega.attention.pipeline.micro_batches import WINDOW, Cut
from sps2_mega.attention.pipeline.schedule import Action, Phase, Stage, stage_order

WHOLE = Cut(head_groups=1, query_parts=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """Duration of one layer, and of its computation and communication by themselves."""

    total_s: float
    compute_s: float
    comm_s: float

    @property
    def exposed_s(self) -> float:
        """Communication that no computation hides."""
        return self.total_s - self.compute_s

    @property
    def hidden_s(self) -> float:
        return self.comm_s - self.exposed_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TravelSeconds:
    """Seconds of one layer on the links, by cargo: keys with values, queries, and results."""

    keys_s: float
    queries_s: float
    results_s: float

    @property
    def total_s(self) -> float:
        return self.keys_s + self.queries_s + self.results_s


NO_TRAVEL = TravelSeconds(keys_s=0.0, queries_s=0.0, results_s=0.0)


def exact_layer(
    transport: str,
    cut: Cut,
    travel: TravelSeconds,
    messages: TravelSeconds,
    compute_s: Sequence[float],
    *,
    on_cpu: bool,
    pipelined: bool,
) -> LayerSeconds:
    """One layer of exact attention by one transport.

    Between GPUs a latency occupies its stream. Between CPUs it is time of a core, which nothing
    hides.

    Args:
        cut: micro-batches of the layer; `WHOLE` for a ring.
        travel: seconds of all bytes of the layer.
        messages: latencies of one micro-batch; each group of heads fetches keys, each part of
            queries travels and returns.
        compute_s: seconds of each step of a ring (one per SP rank), or of the whole layer.
        pipelined: communication overlaps with computation.
    """
    parts = cut.head_groups * cut.query_parts
    latency = TravelSeconds(
        keys_s=cut.head_groups * messages.keys_s,
        queries_s=parts * messages.queries_s,
        results_s=parts * messages.results_s,
    )
    core_s = latency.total_s if on_cpu else 0.0
    if not on_cpu:
        travel = TravelSeconds(
            keys_s=travel.keys_s + latency.keys_s,
            queries_s=travel.queries_s + latency.queries_s,
            results_s=travel.results_s + latency.results_s,
        )
    compute = sum(compute_s)
    if not pipelined:
        total_s = compute + travel.total_s
    elif transport == "ring":
        total_s = ring_s(travel.total_s / max(1, len(compute_s) - 1), compute_s)
    else:
        window = WINDOW if transport == "ulysses" else 1
        total_s = cut_s(cut, window, travel, compute)
    return LayerSeconds(total_s=total_s + core_s, compute_s=compute, comm_s=travel.total_s + core_s)


def level_layer(
    *,
    own_s: float,
    far_s: float,
    travel_s: float,
    latency_s: float,
    parts: int | None,
    on_cpu: bool,
) -> LayerSeconds:
    """One layer of a transport by SP levels, whose own keys hide the first exchanges.

    Args:
        own_s: seconds of attention to the rank's own keys; `far_s` to those of other ranks.
        travel_s: seconds of all bytes of the layer.
        latency_s: seconds of all messages, those of every part; time of a core between CPUs.
        parts: number of parts of the exchanges; None where nothing overlaps.
    """
    compute_s, comm_s = own_s + far_s, travel_s + latency_s
    if parts is None:
        return LayerSeconds(total_s=compute_s + comm_s, compute_s=compute_s, comm_s=comm_s)
    hidden_s, core_s = (travel_s, latency_s) if on_cpu else (comm_s, 0.0)
    total_s = core_s + exchanges_s(own_s, [hidden_s / parts] * parts, [far_s / parts] * parts)
    return LayerSeconds(total_s=total_s, compute_s=compute_s, comm_s=comm_s)


def cut_s(cut: Cut, window: int, travel: TravelSeconds, compute_s: float) -> float:
    """A layer cut by KV heads and by queries, from the seconds of the whole layer.

    Keys of a group of heads come with its first part of queries. At most `window` micro-batches are
    under way in each direction.
    """
    count = cut.head_groups * cut.query_parts
    gather_s = [
        travel.queries_s / count + (0.0 if m % cut.query_parts else travel.keys_s / cut.head_groups)
        for m in range(count)
    ]
    order = _order(count, ahead=window, behind=window, returns=travel.results_s > 0.0)
    total = play(order, gather_s, [compute_s / count] * count, [travel.results_s / count] * count)
    return max(total, travel.total_s)


def exchanges_s(own_s: float, comm_s: Sequence[float], compute_s: Sequence[float]) -> float:
    """Exchanges of `attention.levels`, all posted at once and arriving one after another.

    `own_s` is computed first and needs no other rank; what needs exchange m follows once its
    `comm_s[m]` have passed. Ways back count as ways in.
    """
    count = 1 + len(comm_s)
    order = _order(count, ahead=count, behind=count, returns=False)
    return play(order, [0.0, *comm_s], [own_s, *compute_s], [])


def ring_s(hop_s: float, compute_s: Sequence[float]) -> float:
    """A ring without a way back: hop m brings the keys of step m + 1 while step m computes."""
    order = _order(len(compute_s), ahead=1, behind=1, relayed=True, returns=False)
    return play(order, [0.0] + [hop_s] * (len(compute_s) - 1), compute_s, [])


def play(
    order: Sequence[Stage],
    gather_s: Sequence[float],
    compute_s: Sequence[float],
    scatter_s: Sequence[float],
) -> float:
    """Seconds until the last stage of `order` is done, from the seconds of each micro-batch."""
    now = 0.0
    durations = {Phase.GATHER: gather_s, Phase.SCATTER: scatter_s}
    stream_free = {Phase.GATHER: 0.0, Phase.SCATTER: 0.0}
    arrived: dict[tuple[Phase, int], float] = {}
    for stage in order:
        if stage.action is Action.COMPUTE:
            now += compute_s[stage.micro_batch]
        elif stage.action is Action.POST:
            start = max(now, stream_free[stage.phase])
            stream_free[stage.phase] = start + durations[stage.phase][stage.micro_batch]
            arrived[stage.phase, stage.micro_batch] = stream_free[stage.phase]
        else:
            now = max(now, arrived[stage.phase, stage.micro_batch])
    return now


@cache
def _order(
    count: int, *, ahead: int, behind: int, relayed: bool = False, returns: bool
) -> tuple[Stage, ...]:
    return stage_order(
        [("all",)] * count, ahead=ahead, behind=behind, relayed=relayed, returns=returns
    )
