"""Seconds of one pipelined attention layer: the engine's own stage order, played on three clocks.

Inputs come in over one stream, results return over another, and attention computes, each in the
order of `attention.pipeline.order`; a wait takes until what was posted is there. Both streams send
over one link, so a layer takes no less than all its traffic. Decides no durations: they are the
caller's.

    in        |k0 q0 v0|k1 q1 v1|
    compute            |   0    |   1    |
    out                         |  o0  | |  o1  |          exposed = end - sum of compute
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from sps2_mega.attention.pipeline.schedule import Action, Phase, Stage, stage_order
from sps2_mega.attention.pipeline.settings import Cut


def cut_s(
    cut: Cut,
    window: int,
    *,
    keys_s: float,
    queries_s: float,
    compute_s: float,
    back_s: float,
) -> float:
    """A layer cut by KV heads and by queries. Seconds are those of the whole layer; keys of a group
    of heads come with its first part. At most `window` micro-batches are on their way in each
    direction."""
    count = cut.head_groups * cut.query_parts
    gather_s = [
        queries_s / count + (0.0 if m % cut.query_parts else keys_s / cut.head_groups)
        for m in range(count)
    ]
    order = _order(count, ahead=window, behind=window, returns=back_s > 0.0)
    total = _play(order, gather_s, [compute_s / count] * count, [back_s / count] * count)
    return max(total, keys_s + queries_s + back_s)


def works_s(own_s: float, comm_s: Sequence[float], compute_s: Sequence[float]) -> float:
    """A list of works (`attention.leveled`): `own_s` is computed first and needs nothing from
    others, then work m is computed once its exchange of `comm_s[m]` has come; all exchanges are
    posted at once and come one after another. Ways back count as ways in."""
    count = 1 + len(comm_s)
    order = _order(count, ahead=count, behind=count, returns=False)
    return _play(order, [0.0, *comm_s], [own_s, *compute_s], [])


def ring_s(hop_s: float, compute_s: Sequence[float]) -> float:
    """A ring: hop m brings the keys of step m + 1, which are passed on while step m computes; no
    way back."""
    order = _order(len(compute_s), ahead=1, behind=1, relayed=True, returns=False)
    return _play(order, [0.0] + [hop_s] * (len(compute_s) - 1), compute_s, [])


@cache
def _order(
    count: int, *, ahead: int, behind: int, relayed: bool = False, returns: bool
) -> tuple[Stage, ...]:
    return stage_order(
        [("all",)] * count, ahead=ahead, behind=behind, relayed=relayed, returns=returns
    )


def _play(
    order: Sequence[Stage],
    gather_s: Sequence[float],
    compute_s: Sequence[float],
    scatter_s: Sequence[float],
) -> float:
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
