"""Chunks cover a long prompt in multiples of a block on each rank, and take equal time."""

import pytest

from sps2_mega.scheduler.chunk_bounds import CHUNKS, chunk_lengths
from sps2_mega.scheduler.layer_flops import LayerFlops
from sps2_mega.scheduler.step_times import StepTimeModel

WORK = LayerFlops(num_layers=4, token_flops=1000, pair_flops=1)


def known(seconds_per_flop=1e-8) -> StepTimeModel:
    step_times = StepTimeModel(WORK)
    for end in (100, 1000, 10_000):
        step_times.computed_chunks([(0, 0, end)], WORK.flops(0, end) * seconds_per_flop)
    return step_times


@pytest.mark.parametrize(("start", "end"), [(0, 20_001), (96, 97), (160, 9999), (0, 48)])
def test_cells_cover_the_prompt_and_grow_shorter(start, end):
    lengths = chunk_lengths(known(), start, end, 0.02, unit=48, at_first=96)
    assert sum(lengths) == end - start
    *whole, last = lengths
    assert all(length % 48 == 0 and length > 0 for length in whole) and last > 0
    assert sorted(whole, reverse=True) == whole


def test_cells_take_their_share_of_a_slice():
    step_times, room_s = known(), 0.1
    position = 0
    for length in chunk_lengths(step_times, 0, 20_000, room_s, unit=16, at_first=32)[:-1]:
        seconds = step_times.chunk_s(0, position, position + length)
        assert 0.6 * room_s / CHUNKS < seconds < 1.1 * room_s / CHUNKS
        position += length


def test_nothing_known_is_cut_into_the_least():
    assert chunk_lengths(StepTimeModel(WORK), 64, 300, 0.02, unit=32, at_first=64) == (
        64,
        64,
        64,
        44,
    )
