from __future__ import annotations

import random

import pytest

from sps2_mega.metrics import DurationHistogram, StepMeter, TokenWaits, waits_ended_at
from sps2_mega.types import SamplingParams, Sequence


def test_percentiles_are_within_one_percent() -> None:
    rng = random.Random(1)
    values = [rng.lognormvariate(-4, 2) for _ in range(1001)]
    histogram = DurationHistogram()
    for value in values:
        histogram.add(value)
    values.sort()
    for percent in (1, 50, 90, 99, 100):
        exact = values[max(1, -(-1001 * percent // 100)) - 1]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.0101)


def test_one_value_is_every_percentile() -> None:
    histogram = DurationHistogram()
    assert histogram.percentile(50) is None
    histogram.add(0.0)
    assert histogram.percentile(1) == histogram.percentile(99) == pytest.approx(1e-6, rel=0.02)


def test_memory_is_bounded() -> None:
    histogram = DurationHistogram()
    for index in range(50_000):
        histogram.add(1e-6 * (index + 1))
    assert len(histogram.buckets) < 600


def test_rates_without_steps_are_zero() -> None:
    meter = StepMeter()
    assert (meter.prefill_rate, meter.decode_rate) == (0.0, 0.0)
    meter.record(prompt_tokens=0, output_tokens=4, seconds=2.0)
    assert (meter.prefill_rate, meter.decode_rate) == (0.0, 2.0)


def sequence(arrival: float, *token_times: float) -> Sequence:
    return Sequence(
        seq_id=0,
        prompt_token_ids=[1],
        params=SamplingParams(),
        seed=0,
        max_tokens=9,
        arrival_time=arrival,
        token_times=list(token_times),
    )


def test_waits_of_a_step_are_those_of_its_own_tokens() -> None:
    first, second = sequence(1.0, 5.0), sequence(0.0, 2.0, 4.5, 5.0)
    earlier, none_yet = sequence(0.0, 4.0), sequence(4.0)
    waits = waits_ended_at(5.0, [first, second, earlier, none_yet])
    assert waits == TokenWaits(ttfts_s=(4.0,), gaps_s=(0.5,))
    assert waits_ended_at(5.0, []) == TokenWaits()
