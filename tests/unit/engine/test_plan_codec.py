from sps2_mega.engine.plan_codec import decode, encode
from sps2_mega.types import DecodeItem, ForwardMode, PrefillItem, SamplingParams, StepPlan


def test_prefill_plan_survives():
    params = SamplingParams(
        max_tokens=None, seed=2**63 + 5, stop=("a", "é"), stop_token_ids=(3,), logprobs=2, top_p=0.1
    )
    item = PrefillItem(7, [1, 2, 2**31], 2, [0, 1], [5, 0], params, 2**64 - 1, 1, 2)
    plan = StepPlan(3, ForwardMode.PREFILL, [item], [], [1, 2])
    assert decode(encode(plan)) == plan


def test_decode_plan_survives_and_is_small():
    items = [
        DecodeItem(i, 100_000 + i, 10**6 + i, (1, i) if i % 3 == 0 else None) for i in range(16)
    ]
    plan = StepPlan(10**7, ForwardMode.DECODE, [], items, [])
    assert decode(encode(plan)) == plan
    assert len(encode(plan)) < 500
