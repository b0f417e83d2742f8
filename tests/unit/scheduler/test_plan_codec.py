import dataclasses

from sps2_mega.scheduler.plan_codec import NOT_SENT, decode, encode
from sps2_mega.types import (
    DecodeItem,
    ForwardMode,
    LayerSlice,
    PrefillItem,
    SamplingParams,
    StepPlan,
)

PARAMS = SamplingParams(
    max_tokens=None, seed=2**63 + 5, stop=("a", "é"), stop_token_ids=(3,), logprobs=2, top_p=0.1
)
ITEM = PrefillItem(7, [1, 2, 2**31], 2, [0, 1], [5, 0], PARAMS, 2**64 - 1, 0, 3)


def plan_of(*items):
    return StepPlan(3, ForwardMode.PREFILL, list(items), [], [1, 2])


def test_prefill_plan_survives():
    shared = dataclasses.replace(ITEM, num_shared_tokens=16, spans=(4, 2**40))
    plan = plan_of(ITEM, shared)
    assert decode(encode(plan)) == plan


def test_hybrid_plan_survives():
    plan = StepPlan(9, ForwardMode.HYBRID, [ITEM], [DecodeItem(1, 2, 3, (0, 4))], [])
    assert decode(encode(plan)) == plan


def test_only_tokens_that_the_step_reads_travel():
    chunk = dataclasses.replace(ITEM, start=1, end=2)
    last = dataclasses.replace(ITEM, start=1, end=3)
    (first_item, last_item) = decode(encode(plan_of(chunk, last))).prefills
    assert first_item.token_ids == [NOT_SENT, 2, NOT_SENT] and not first_item.samples
    assert last_item.token_ids == [NOT_SENT, 2, 2**31] and last_item.samples
    long = dataclasses.replace(ITEM, token_ids=list(range(100_000)), start=99_000, end=99_512)
    assert len(encode(plan_of(long))) < 5_000


def test_penalties_need_the_whole_text_but_only_where_a_token_is_sampled():
    params = PARAMS.replace(presence_penalty=0.5)
    last = dataclasses.replace(ITEM, start=1, end=3, params=params)
    assert decode(encode(plan_of(last))).prefills == [last]
    chunk = dataclasses.replace(last, end=2)
    assert decode(encode(plan_of(chunk))).prefills[0].token_ids == [NOT_SENT, 2, NOT_SENT]


def test_decode_plan_survives_and_is_small():
    items = [
        DecodeItem(i, 100_000 + i, 10**6 + i, (1, i) if i % 3 == 0 else None) for i in range(16)
    ]
    plan = StepPlan(10**7, ForwardMode.DECODE, [], items, [])
    assert decode(encode(plan)) == plan
    assert len(encode(plan)) < 500


def test_slices_of_layers_survive_and_later_ones_are_small():
    first = dataclasses.replace(plan_of(ITEM), layers=LayerSlice(2**40, 0, 1))
    assert decode(encode(first)) == first and first.sampled == []
    last = dataclasses.replace(plan_of(), layers=LayerSlice(2**40, 1, 4, (7, 9)), dropped=[3])
    assert decode(encode(last)) == last and last.sampled == [7, 9]
    assert len(encode(last)) < 43
    within = LayerSlice(2**40, 1, 2, chunked=True, first_token=300, end_token=44)
    plan = dataclasses.replace(plan_of(), layers=within)
    assert decode(encode(plan)) == plan and not within.begins
