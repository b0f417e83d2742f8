"""Stretches of a prompt: every token once, on its rank, in order."""

import itertools
import random

import pytest

from sps2_mega.attention.layout.chunk_layout import stretch
from sps2_mega.attention.layout.token_layout import build_layout


@pytest.mark.parametrize("seed", range(8))
def test_stretches_that_follow_one_another_cover_each_ranks_rows_in_order(seed):
    numbers = random.Random(seed)
    size, block_size = numbers.choice((1, 2, 3, 5)), numbers.choice((1, 4, 7))
    start, end = sorted(numbers.sample(range(120), 2))
    ranks = [numbers.randrange(size) for _ in range(-(-end // block_size))]
    layout = build_layout([ranks], [end], starts=[start], block_size=block_size, sp_size=size)
    cuts = sorted({start, end, *(numbers.randrange(start, end + 1) for _ in range(4))})
    following = [0] * size
    for low, high in itertools.pairwise(cuts):
        found = stretch(layout.queries, low, high)
        positions = [[] for _ in range(size)]
        for run in found.tokens.runs:
            assert run.local_start == len(positions[run.rank])
            positions[run.rank] += range(run.start, run.end)
        for rank in range(size):
            expected = [p for p in range(low, high) if ranks[p // block_size] == rank]
            assert positions[rank] == expected
            assert found.tokens.counts[rank] == len(expected)
            if expected:
                assert found.rows(rank).start == following[rank]
            following[rank] += len(expected)
    assert tuple(following) == layout.queries.counts


def test_keys_of_a_first_chunk_begin_with_what_was_cached():
    layout = build_layout([[0, 1, 1, 0]], [15], starts=[5], block_size=4, sp_size=2)
    found = stretch(layout.keys, 0, 10)
    assert found.tokens.counts == (4, 6) and (found.tokens.first, found.tokens.last) == (
        (0,),
        (10,),
    )
    # The run on rank 1 is cut where the cached tokens end, as the layout has it.
    assert [(run.rank, run.start, run.end) for run in found.tokens.runs] == [
        (0, 0, 4),
        (1, 4, 5),
        (1, 5, 10),
    ]


def test_a_rank_without_tokens_has_no_rows():
    layout = build_layout([[0, 0, 1]], [9], block_size=4, sp_size=3)
    assert [stretch(layout.queries, 1, 7).rows(rank) for rank in range(3)] == [
        slice(1, 7),
        slice(0, 0),
        slice(0, 0),
    ]


def test_what_is_outside_is_refused():
    layout = build_layout([[0, 1]], [8], starts=[3], block_size=4, sp_size=2)
    with pytest.raises(AssertionError, match=r"\[2, 5\) of tokens \[3, 8\)"):
        stretch(layout.queries, 2, 5)
