"""Choice between rows that stay with their owner and weights that SP ranks share."""

from __future__ import annotations

import pytest

from sps2_mega.parallel.weight_placement import (
    PlacementTimes,
    WeightPlacement,
    choose_placement,
)

# Reading the weights takes 8 ms, half of them 4 ms; an exchange 1 ms and 0.1 ms per row.
TIMES = PlacementTimes(
    rows=(1, 8, 32),
    alone_s=(8.0, 8.0, 20.0),
    busy_s=(10.0, 10.0, 24.0),
    sliced_s=(5.1, 5.8, 15.0),
)


@pytest.mark.parametrize(
    ("rows_by_rank", "owner", "sliced"),
    [
        ((1, 0), 8.0, 5.1),
        ((1, 1), 10.0, 5.2),
        ((8, 0), 8.0, 5.8),
        ((20, 20), 17.0, 15.0 + 8 * 9.2 / 24),
        ((44, 0), 26.0, 15.0 + 12 * 9.2 / 24),  # beyond what was measured
        ((1, 1, 0, 0), 8.0 + 2.0 / 3, 5.2),
        ((0, 0), 0.0, 5.1),
    ],
)
def test_seconds(rows_by_rank, owner, sliced):
    assert TIMES.owner(rows_by_rank) == pytest.approx(owner)
    assert TIMES.sliced(rows_by_rank) == pytest.approx(sliced)
    assert choose_placement(TIMES, rows_by_rank) == ("sliced" if sliced < owner else "owner")


def test_many_rows_stay_with_their_owners():
    """Rows cost each rank the same FLOPs either way, and only slicing sends them."""
    times = PlacementTimes((1, 64), (8.0, 9.0), (8.0, 9.0), (5.0, 8.0))
    assert choose_placement(times, (8, 8)) == "sliced"
    assert choose_placement(times, (4000, 4000)) == "owner"


def test_a_forced_placement_needs_several_ranks_and_a_row():
    forced = WeightPlacement(forced="sliced")
    assert forced.sliced_layers((3, 0)) and forced.sliced_output((0, 1))
    assert not forced.sliced_layers((3,))
    assert not forced.sliced_output((0, 0))
    assert not WeightPlacement().sliced_layers((1, 1))


def test_both_kinds_of_layers_are_chosen_apart():
    slow = PlacementTimes((1, 8), (1.0, 1.0), (1.0, 1.0), (9.0, 9.0))
    placement = WeightPlacement(None, feed_forward=TIMES, output=slow)
    assert placement.sliced_layers((1, 0))
    assert not placement.sliced_output((1, 0))
