from __future__ import annotations

import pytest

from sps2_mega.errors import Refusal, RequestError
from sps2_mega.scheduler.admission import Limits, refusal
from sps2_mega.scheduler.plan_codec import decode, encode
from sps2_mega.types import ForwardMode, PrefillItem, SamplingParams, Sequence, StepPlan


@pytest.mark.parametrize(
    "fields",
    [
        dict(max_tokens=2**31),
        dict(top_k=10**30),
        dict(max_tokens=None, min_tokens=10**30),
        dict(stop_token_ids=(10**30,)),
        dict(stop_token_ids=(-1,)),
        dict(stop=("\ud800",)),
        dict(stop=("x",) * 65),
        dict(stop_token_ids=(1,) * 1025),
        dict(repetition_penalty=1e-300),
        dict(temperature=float("nan")),
    ],
)
def test_values_that_would_break_a_rank_are_refused(fields) -> None:
    with pytest.raises(RequestError, match=next(reversed(fields))):
        SamplingParams(**fields)


def test_the_largest_values_travel() -> None:
    params = SamplingParams(
        max_tokens=2**31 - 1,
        min_tokens=2**31 - 1,
        top_k=2**31 - 1,
        stop_token_ids=(0, 2**31 - 1),
        stop=("\U0010ffff",),
        seed=2**64 - 1,
    )
    item = PrefillItem(0, [1], 1, [0], [0], params, 2**64 - 1, 0, 1)
    plan = StepPlan(1, ForwardMode.PREFILL, [item], [], [])
    assert decode(encode(plan)) == plan


def test_stop_tokens_are_of_the_vocabulary() -> None:
    limits = Limits(max_model_len=9, cache_tokens=9, vocab_size=100, eos_token_ids=frozenset())

    def asked(*stop_token_ids: int) -> Refusal | None:
        params = SamplingParams(max_tokens=2, stop_token_ids=stop_token_ids)
        one = Sequence(
            seq_id=0, prompt_token_ids=[1], params=params, seed=0, max_tokens=2, arrival_time=0.0
        )
        return refusal(one, limits)

    assert asked() is None
    assert asked(99) is None
    assert asked(5, 100) is Refusal.STOP_TOKEN_OUT_OF_RANGE
