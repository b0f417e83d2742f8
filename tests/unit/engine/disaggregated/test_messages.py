"""Messages and frames survive the way from one pool to the other."""

from __future__ import annotations

import pytest

from sps2_mega.engine.disaggregated import frames, messages
from sps2_mega.engine.disaggregated.kv_transfer import Destination
from sps2_mega.engine.disaggregated.kv_transfer_plan import Placement
from sps2_mega.logprobs import TokenLogprob
from sps2_mega.types import (
    DecodeItem,
    FinishReason,
    ForwardMode,
    PrefillItem,
    SamplingParams,
    StepPlan,
)

PARAMS = SamplingParams(
    max_tokens=7,
    seed=2**64 - 1,
    stop=("a", "\n"),
    stop_token_ids=(3,),
    presence_penalty=0.25,
    logprobs=2,
)


@pytest.mark.parametrize(
    "message",
    [
        messages.Hello(640, 40, True),
        messages.Expect(3, [5, 0, 2**31], PARAMS, 2**63 - 1, 12, 0.25),
        messages.Room(3, 9, 5, 0, [1, 0], [0, 7]),
        messages.Start(3, 9, 17),
        messages.Drop(3, None),
        messages.Drop(3, 9, damaged=True),
        messages.Tokens([], (0, 7)),
        messages.Tokens(
            [
                messages.NewToken(1, None, None, FinishReason.ERROR),
                messages.NewToken(2, 5, TokenLogprob(5, -0.125, ((5, -0.125), (1, -2.5))), None),
                messages.NewToken(4, 0, TokenLogprob(0, -1.0), FinishReason.STOP),
            ],
            (11,),
        ),
        messages.Arrived(9),
        messages.Leave(),
        messages.Left(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_arrive_as_they_were_sent(message):
    payload = messages.encode(message)
    again = messages.decode(messages.kind_of(message), payload)
    assert again == message
    assert type(again) is type(message)


def test_frames_arrive_as_they_were_sent():
    item = PrefillItem(1, [7, 8, 9], 2, [0], [4], SamplingParams(presence_penalty=1.0), 5, 3, 3)
    plan = StepPlan(8, ForwardMode.DECODE, [], [DecodeItem(1, 6, 3, (0, 2))], [])
    assert frames.decode_decode(frames.encode_decode(plan, [4, item, 1])) == (plan, [4, item, 1])
    whole = PrefillItem(1, [7, 8, 9], 3, [0], [4], SamplingParams(), 5, 0, 3)
    plan = StepPlan(8, ForwardMode.PREFILL, [whole], [], [2])
    payload = frames.encode_prefill(plan, {1: Destination(6, 2, Placement([1, 0], [3, 5]))})
    again, destinations, cuts = frames.decode_prefill(payload)
    assert again == plan and cuts == []
    destination = destinations[1]
    assert (destination.handoff, destination.first) == (6, 2)
    assert list(destination.placement.block_ranks) == [1, 0]
    assert list(destination.placement.block_ids) == [3, 5]


def test_cuts_travel_without_a_plan():
    cuts = [frames.Cut(3, 9, (4, 5)), frames.Cut(4, 10, ())]
    assert frames.decode_prefill(frames.encode_prefill(None, {}, cuts)) == (None, {}, cuts)
