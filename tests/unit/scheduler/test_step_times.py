"""Expected seconds of the next layers, from measurements of earlier ones."""

import itertools

import pytest

from sps2_mega.config import ModelConfig
from sps2_mega.scheduler.layer_flops import LayerFlops
from sps2_mega.scheduler.step_times import StepTimeModel

WORK = LayerFlops(num_layers=4, token_flops=1000, pair_flops=10)


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
    work = LayerFlops.of(model)
    assert work.num_layers == 3
    assert work.token_flops == 2 * (8 * 4 * 5 * 2 + 8 * 2 * 5 * 2 + 3 * 8 * 10)
    assert work.pair_flops == 4 * 4 * 5
    assert work.flops(0, 1) == work.token_flops + work.pair_flops
    whole = work.flops(0, 17)
    assert whole == work.flops(0, 5) + work.flops(5, 17)
    assert whole == 17 * work.token_flops + 17 * 18 // 2 * work.pair_flops


def test_nothing_is_expected_before_something_was_measured():
    step_times = StepTimeModel(WORK)
    assert step_times.layer_s(10**6) is None
    assert step_times.prompt_s(0, 1000) == 0.0 and step_times.decode_s == 0.0
    assert step_times.tokens_within(1.0, 0, 1000, 64) == 64, "the least"
    assert step_times.tokens_within(1.0, 990, 1000, 64) == 10


def test_short_prompts_say_nothing_about_long_ones():
    step_times = StepTimeModel(WORK)
    step_times.computed(10**9, 1.0)
    for _ in range(1000):
        step_times.computed(10**3, 0.01)
    assert step_times.layer_s(10**9) == pytest.approx(1.0)
    assert step_times.layer_s(2 * 10**9) == pytest.approx(2.0)
    assert step_times.layer_s(10**3) == pytest.approx(0.01)


def test_measurements_replace_what_was_known():
    step_times = StepTimeModel(WORK)
    step_times.computed(10**9, 8.0)
    for _ in range(12):
        step_times.computed(10**9, 1.0)
    assert step_times.layer_s(10**9) == pytest.approx(1.0, rel=0.01)


def test_a_decode_step_is_expected_to_take_what_few_exceed():
    step_times = StepTimeModel(WORK)
    step_times.decoded(0.01)
    assert step_times.decode_s == pytest.approx(0.01)
    for seconds in (0.01, 0.014) * 30:
        step_times.decoded(seconds)
    assert 0.0135 < step_times.decode_s < 0.015, "the mean and how far steps are from it"
    step_times.decoded(0.5)
    assert 0.017 < step_times.decode_s < 0.025, "one slow step counts, but not for all"
    for _ in range(30):
        step_times.decoded(0.01)
    assert step_times.decode_s == pytest.approx(0.01, rel=0.05)


def test_chunks_are_remembered_by_their_place_in_the_prompt():
    """Two layers of two prompts fix both speeds: an early one and a late one."""
    step_times = StepTimeModel(WORK)
    assert step_times.chunk_s(0, 0, 64) is None

    def taken(start, end):
        return (end - start) * 1e-5 + (end**2 - start**2) * 3e-9

    bounds = [0, 700, 1300, 2000, 2600, 3001]
    chunks = list(itertools.pairwise(bounds))
    for _ in range(4):
        for chunk in chunks:
            step_times.computed_chunks([(1, *chunk)], taken(*chunk))
    for chunk in chunks:
        assert step_times.chunk_s(2, *chunk) == pytest.approx(taken(*chunk), rel=0.1)


def test_the_time_of_two_chunks_is_shared_as_expected_of_them():
    step_times = StepTimeModel(WORK)
    step_times.computed_chunks([(0, 0, 100)], 0.1)
    step_times.computed_chunks([(1, 900, 1000)], 0.4)
    for _ in range(40):
        step_times.computed_chunks([(1, 900, 1000), (2, 0, 100)], 1.0)
    assert step_times.chunk_s(0, 0, 100) == pytest.approx(0.2, rel=0.01)
    assert step_times.chunk_s(0, 900, 1000) == pytest.approx(0.8, rel=0.01)


@pytest.mark.parametrize("start", [0, 100, 5000])
@pytest.mark.parametrize("seconds", [0.0, 0.003, 0.01, 0.1, 10.0])
def test_chunks_are_as_long_as_a_layer_may_take(start, seconds):
    step_times = StepTimeModel(WORK)
    for exponent in range(3, 10):
        step_times.computed(10**exponent, 10**exponent * 1e-8)
    end, quantum = start + 3001, 48
    count = step_times.tokens_within(seconds, start, end, quantum)
    assert 0 < count <= 3001 and (count % quantum == 0 or count == 3001)
    if count > quantum:
        assert step_times.layer_s(WORK.flops(start, start + count)) <= seconds
    if count < 3001:
        assert step_times.layer_s(WORK.flops(start, min(end, start + count + quantum))) > seconds


def test_the_furthest_cut_that_fits_is_found_and_one_is_always_taken():
    step_times = StepTimeModel(WORK)
    ends = [150, 200, 290, 1000]
    assert step_times.furthest(1.0, 0, 100, ends) == 150, "nothing is known"
    step_times.computed_chunks([(0, 0, 100)], 0.1)
    for end in ends:
        seconds = step_times.chunk_s(0, 100, end)
        assert step_times.furthest(seconds * 1.001, 0, 100, ends) == end
    assert step_times.furthest(0.0, 0, 100, ends) == step_times.furthest(-1.0, 0, 100, ends) == 150
    assert step_times.furthest(1e6, 0, 100, ends) == 1000


def test_chunks_of_the_last_layer_are_remembered_apart():
    step_times = StepTimeModel(WORK)
    step_times.computed_chunks([(0, 0, 100)], 0.1)
    assert step_times.chunk_s(3, 0, 100) == pytest.approx(0.1), (
        "as the others until it was measured"
    )
    step_times.computed_chunks([(3, 0, 100)], 0.02)
    assert step_times.chunk_s(3, 0, 100) == pytest.approx(0.02)
    assert step_times.chunk_s(2, 0, 100) == pytest.approx(0.1)
    assert step_times.layer_s(WORK.flops(0, 100)) == pytest.approx(0.1)


def test_one_disturbed_chunk_does_not_stop_the_next_ones():
    step_times = StepTimeModel(WORK)
    for _ in range(5):
        step_times.computed_chunks([(0, 1000, 1100)], 0.1)
    step_times.computed_chunks([(0, 1000, 1100)], 3.0)
    assert step_times.chunk_s(0, 1000, 1100) < 0.17
    for _ in range(20):
        step_times.computed_chunks([(0, 1000, 1100)], 0.6)
    assert step_times.chunk_s(0, 1000, 1100) == pytest.approx(0.6, rel=0.05), (
        "a slower machine is believed"
    )
