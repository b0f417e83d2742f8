"""Frames that a driver broadcasts to its pool before each step: a plan and its extras <-> bytes.

prefill   the plan, and the destination of each sequence whose pass begins
decode    changes in order (sequences that enter, ids that leave), then the plan
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgpack

from sps2_mega.engine.disaggregated.kv_transfer import Destination
from sps2_mega.engine.disaggregated.kv_transfer_plan import Placement
from sps2_mega.scheduler.decode_scheduler import Change
from sps2_mega.scheduler.plan_codec import decode, encode
from sps2_mega.types import ForwardMode, StepPlan

Destinations = Mapping[int, Destination]


@dataclass(frozen=True, slots=True)
class Cut:
    """End of a sequence before all of it was computed: nothing more is sent of `handoff`, which
    reaches `ranks` of the job."""

    seq_id: int
    handoff: int
    ranks: tuple[int, ...]


def encode_prefill(
    plan: StepPlan | None, destinations: Destinations, cuts: Sequence[Cut] = ()
) -> bytes:
    """Frame of a prefill step, or of cuts alone (`plan` None)."""
    rows = [
        (seq_id, d.handoff, d.first, d.placement.block_ranks, d.placement.block_ids)
        for seq_id, d in destinations.items()
    ]
    ended = [(cut.seq_id, cut.handoff, cut.ranks) for cut in cuts]
    return bytes(msgpack.packb((plan and encode(plan), rows, ended)))


def decode_prefill(payload: bytes) -> tuple[StepPlan | None, dict[int, Destination], list[Cut]]:
    """Plan, destinations and cuts of a frame."""
    plan, rows, ended = msgpack.unpackb(payload, use_list=False)
    destinations = {
        seq_id: Destination(handoff, first, Placement(ranks, ids))
        for seq_id, handoff, first, ranks, ids in rows
    }
    return plan and decode(plan), destinations, [Cut(*cut) for cut in ended]


def encode_decode(plan: StepPlan, changes: Sequence[Change]) -> bytes:
    """Frame of a decode step."""
    packed = [
        change
        if isinstance(change, int)
        else encode(StepPlan(0, ForwardMode.PREFILL, [change], [], []))
        for change in changes
    ]
    return bytes(msgpack.packb((encode(plan), packed)))


def decode_decode(payload: bytes) -> tuple[StepPlan, list[Change]]:
    """Plan and changes of a frame."""
    plan, packed = msgpack.unpackb(payload, use_list=False)
    return decode(plan), [
        change if isinstance(change, int) else decode(change).prefills[0] for change in packed
    ]
