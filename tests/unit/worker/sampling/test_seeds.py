"""Counter-based random numbers: reproducible, uniform along positions and across seeds."""

import itertools

import pytest

from sps2_mega.worker.sampling.seeds import derive_seed, uniform


def chi_square(values, num_bins=64):
    counts = [0] * num_bins
    for value in values:
        counts[int(value * num_bins)] += 1
    expected = len(values) / num_bins
    return sum((count - expected) ** 2 / expected for count in counts)


# 63 degrees of freedom: 103.4 is passed by a fair generator 99.9 % of the time; the numbers are
# fixed.
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 123456789])
def test_positions_of_one_seed_are_uniform_and_uncorrelated(seed):
    values = [uniform(seed, position) for position in range(20_000)]
    assert all(0.0 <= value < 1.0 for value in values)
    assert chi_square(values) < 103.4
    lagged = sum((a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(values)) * 12 / len(values)
    assert abs(lagged) < 0.025


def test_neighbouring_seeds_are_uniform_and_uncorrelated():
    assert chi_square([uniform(seed, 5) for seed in range(20_000)]) < 103.4
    pairs = [(uniform(0, position), uniform(1, position)) for position in range(20_000)]
    assert abs(sum((a - 0.5) * (b - 0.5) for a, b in pairs) * 12 / len(pairs)) < 0.025


def test_numbers_never_change_between_versions():
    assert [uniform(42, position) for position in (0, 1, 1_000_000)] == [
        uniform(42 - 2**64, p) for p in (0, 1, 1_000_000)
    ]
    assert uniform(0, 0) == 0.6524484863740322
    assert uniform(42, 7) == 0.7347204584623639
    assert derive_seed(42, 3) == 3178385655219032364


def test_samples_of_a_request_have_different_streams_and_the_first_is_its_own():
    assert derive_seed(-5, 0) == -5
    seeds = [derive_seed(7, index) for index in range(128)] + [
        derive_seed(8, index) for index in range(128)
    ]
    assert len(set(seeds)) == 256
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert chi_square([uniform(derive_seed(7, index), 3) for index in range(20_000)]) < 103.4
