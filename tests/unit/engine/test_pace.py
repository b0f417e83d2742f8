"""What is expected of the next layers, from what was measured of earlier ones."""

import pytest

from sps2_mega.config import ModelConfig
from sps2_mega.engine.layer_work import LayerWork
from sps2_mega.engine.pace import Pace

WORK = LayerWork(num_layers=4, token_flops=1000, pair_flops=10)


def test_work_counts_weights_twice_and_every_key_that_is_seen():
    model = ModelConfig(
        family="llama",
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=10,
        num_heads=4,
        num_kv_heads=2,
        head_dim=5,
        vocab_size=50,
        max_position_embeddings=64,
    )
    work = LayerWork.of(model)
    assert work.num_layers == 3
    assert work.token_flops == 2 * (8 * 4 * 5 * 2 + 8 * 2 * 5 * 2 + 3 * 8 * 10)
    assert work.pair_flops == 4 * 4 * 5
    assert work.flops(0, 1) == work.token_flops + work.pair_flops
    whole = work.flops(0, 17)
    assert whole == work.flops(0, 5) + work.flops(5, 17)
    assert whole == 17 * work.token_flops + 17 * 18 // 2 * work.pair_flops


def test_nothing_is_expected_before_something_was_measured():
    pace = Pace(WORK)
    assert pace.layer_s(10**6) is None
    assert pace.prompt_s(0, 1000) == 0.0 and pace.decode_s == 0.0
    assert pace.tokens_within(1.0, 0, 1000, 64) == 64, "the least"
    assert pace.tokens_within(1.0, 990, 1000, 64) == 10


def test_short_prompts_say_nothing_about_long_ones():
    pace = Pace(WORK)
    pace.computed(10**9, 1.0)
    for _ in range(1000):
        pace.computed(10**3, 0.01)
    assert pace.layer_s(10**9) == pytest.approx(1.0)
    assert pace.layer_s(2 * 10**9) == pytest.approx(2.0)
    assert pace.layer_s(10**3) == pytest.approx(0.01)


def test_measurements_replace_what_was_known():
    pace = Pace(WORK)
    pace.computed(10**9, 8.0)
    for _ in range(12):
        pace.computed(10**9, 1.0)
    assert pace.layer_s(10**9) == pytest.approx(1.0, rel=0.01)


def test_a_decode_step_is_expected_to_be_as_slow_as_the_slowest_of_the_last():
    pace = Pace(WORK)
    for seconds in (0.01, 0.05, 0.01):
        pace.decoded(seconds)
    assert 0.04 < pace.decode_s < 0.05
    for _ in range(30):
        pace.decoded(0.01)
    assert pace.decode_s == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("start", [0, 100, 5000])
@pytest.mark.parametrize("seconds", [0.0, 0.003, 0.01, 0.1, 10.0])
def test_chunks_are_as_long_as_a_layer_may_take(start, seconds):
    pace = Pace(WORK)
    for exponent in range(3, 10):
        pace.computed(10**exponent, 10**exponent * 1e-8)
    end, quantum = start + 3001, 48
    count = pace.tokens_within(seconds, start, end, quantum)
    assert 0 < count <= 3001 and (count % quantum == 0 or count == 3001)
    if count > quantum:
        assert pace.layer_s(WORK.flops(start, start + count)) <= seconds
    if count < 3001:
        assert pace.layer_s(WORK.flops(start, min(end, start + count + quantum))) > seconds
