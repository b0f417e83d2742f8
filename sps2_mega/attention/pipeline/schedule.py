"""Stages of a pipelined attention layer: the order of posts, waits and computations, from counts.

There are three phases: `gather` brings in the inputs of a micro-batch, `compute` works on them,
`scatter` returns the result. While micro-batch m computes, m + 1 .. m + ahead are on their way in
and m - behind .. m - 1 on their way back:

    gather    0 1   2   3
    compute       0   1   2   3            ahead = behind = 1, time to the right
    scatter           0   1   2   3

Every rank runs the same list, so the collectives of all ranks match whatever each of them holds.
The transport decides what travels and what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """Action of a stage."""

    POST = "post"
    WAIT = "wait"
    COMPUTE = "compute"


class Phase(StrEnum):
    """Phase of a micro-batch."""

    GATHER = "gather"
    COMPUTE = "compute"
    SCATTER = "scatter"


@dataclass(frozen=True, slots=True)
class Stage:
    """One action; `part` names an input of the micro-batch (`k`, `q`, `v`, ...), else empty."""

    action: Action
    phase: Phase
    micro_batch: int
    part: str = ""


def stage_order(
    inputs: Sequence[Sequence[str]],
    *,
    ahead: int = 1,
    behind: int = 1,
    relayed: bool = False,
    returns: bool = True,
) -> tuple[Stage, ...]:
    """List the stages of one layer.

    `inputs[m]` are the parts that micro-batch m needs and that no earlier one brought, in the order
    in which they are posted. At most `ahead` micro-batches are posted before they are needed, and
    at most `behind` results are in flight when the next one is computed. With `relayed` (a ring),
    the next input is the one that has just arrived, so it cannot be posted earlier; `ahead` is then
    1. Without `returns`, results stay where they are computed.

    Raises:
        ValueError: a window is negative, or a ring would look further ahead than 1.
    """
    if ahead < 0 or behind < 0:
        raise ValueError(f"windows must not be negative, got ahead={ahead}, behind={behind}")
    if relayed and ahead != 1:
        raise ValueError(f"what is relayed can be posted one step ahead, not {ahead}")
    count = len(inputs)
    stages: list[Stage] = []
    posted = returned = 0
    for m in range(count):
        while posted < min(count, m + 1 if relayed else m + ahead + 1):
            stages += _gather(Action.POST, posted, inputs)
            posted += 1
        stages += _gather(Action.WAIT, m, inputs)
        if relayed and posted == m + 1 < count:
            stages += _gather(Action.POST, posted, inputs)
            posted += 1
        stages.append(Stage(Action.COMPUTE, Phase.COMPUTE, m))
        if not returns:
            continue
        stages.append(Stage(Action.POST, Phase.SCATTER, m))
        last = count if m == count - 1 else m + 1 - behind
        while returned < last:
            stages.append(Stage(Action.WAIT, Phase.SCATTER, returned))
            returned += 1
    return tuple(stages)


def inputs_by_heads_and_queries(head_groups: int, query_parts: int) -> list[tuple[str, ...]]:
    """List the inputs of attention cut by KV heads, and each group of heads by query tokens.

    Micro-batch `group * query_parts + part`. Keys come first, then the first queries, then values,
    as scores need no values. The other queries of the group find keys and values in place.
    """
    first: tuple[str, ...] = ("k", "q", "v")
    return ([first] + [("q",)] * (query_parts - 1)) * head_groups


def _gather(action: Action, micro_batch: int, inputs: Sequence[Sequence[str]]) -> list[Stage]:
    return [Stage(action, Phase.GATHER, micro_batch, part) for part in inputs[micro_batch]]
