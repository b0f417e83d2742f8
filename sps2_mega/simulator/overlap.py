"""Seconds of one pipelined attention layer: the engine's own stage order, played on three clocks.

Inputs come in over one lane, results return over another, and attention computes, each in the order of
`attention.pipeline.order`; a wait takes until what was posted is there. Decides no durations: they are the caller's.

    in        |k0 q0 v0|k1 q1 v1|
    compute            |   0    |   1    |
    out                         |  o0  | |  o1  |          exposed = end - sum of compute
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from sps2_mega.attention.pipeline.order import Action, Phase, Stage, stage_order
from sps2_mega.attention.pipeline.settings import WINDOW


def pipelined_s(
    gather_s: Sequence[float], compute_s: Sequence[float], scatter_s: Sequence[float]
) -> float:
    """Micro-batch m needs `gather_s[m]` of incoming and `scatter_s[m]` of outgoing traffic."""
    order = _order(len(compute_s), ahead=WINDOW, behind=WINDOW, relayed=False)
    return _play(order, gather_s, compute_s, scatter_s)


def ring_s(hop_s: float, compute_s: Sequence[float]) -> float:
    """A ring: hop m brings the keys of step m + 1, which are passed on while step m computes; no way back."""
    order = _order(len(compute_s), ahead=1, behind=1, relayed=True)
    hops = [0.0] + [hop_s] * (len(compute_s) - 1)
    return _play(order, hops, compute_s, hops)


@cache
def _order(count: int, *, ahead: int, behind: int, relayed: bool) -> tuple[Stage, ...]:
    inputs = [("all",)] * count
    return stage_order(inputs, ahead=ahead, behind=behind, relayed=relayed, returns=not relayed)


def _play(
    order: Sequence[Stage],
    gather_s: Sequence[float],
    compute_s: Sequence[float],
    scatter_s: Sequence[float],
) -> float:
    now = 0.0
    durations = {Phase.GATHER: gather_s, Phase.SCATTER: scatter_s}
    lane_free = {Phase.GATHER: 0.0, Phase.SCATTER: 0.0}
    arrived: dict[tuple[Phase, int], float] = {}
    for stage in order:
        if stage.action is Action.COMPUTE:
            now += compute_s[stage.micro_batch]
        elif stage.action is Action.POST:
            start = max(now, lane_free[stage.phase])
            lane_free[stage.phase] = start + durations[stage.phase][stage.micro_batch]
            arrived[stage.phase, stage.micro_batch] = lane_free[stage.phase]
        else:
            now = max(now, arrived[stage.phase, stage.micro_batch])
    return now
