"""Placement: balanced, within each rank's free blocks, and every block placed exactly once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_mega.kv_cache.placement import next_block_rank, prompt_block_ranks, shard_sizes

FREE = st.lists(st.integers(0, 20), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("num_blocks", "free", "sizes"),
    [
        (0, [3, 3], [0, 0]),
        (1, [3, 5, 4], [0, 1, 0]),
        (1, [4, 4], [1, 0]),
        (7, [9, 9, 9], [3, 2, 2]),
        (8, [9, 9, 10], [3, 2, 3]),
        (9, [1, 9, 9], [1, 4, 4]),
        (19, [1, 9, 9], [1, 9, 9]),
        (20, [1, 9, 9], None),
        (5, [8], [5]),
        (1, [0, 0], None),
    ],
)
def test_shard_sizes_of_known_cases(num_blocks, free, sizes):
    assert shard_sizes(num_blocks, free) == sizes


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 130), FREE)
def test_shard_sizes_are_as_equal_as_free_blocks_allow(num_blocks, free):
    sizes = shard_sizes(num_blocks, free)
    if sizes is None:
        assert num_blocks > sum(free)
        return
    assert sum(sizes) == num_blocks
    assert all(0 <= size <= limit for size, limit in zip(sizes, free, strict=True))
    largest = max(sizes)
    # A rank may have fewer than the largest minus one only if it had no more free blocks.
    assert all(
        size >= largest - 1 or size == limit for size, limit in zip(sizes, free, strict=True)
    )


def test_contiguous_gives_each_rank_one_run_in_rank_order():
    assert prompt_block_ranks(7, [9, 9, 9], "contiguous") == [0, 0, 0, 1, 1, 2, 2]
    assert prompt_block_ranks(1, [2, 3], "contiguous") == [1]
    assert prompt_block_ranks(3, [1, 1], "contiguous") is None


def test_zigzag_gives_each_rank_an_early_and_a_late_run():
    assert prompt_block_ranks(8, [9, 9], "zigzag") == [0, 0, 1, 1, 1, 1, 0, 0]
    assert prompt_block_ranks(7, [9, 9], "zigzag") == [0, 0, 1, 1, 1, 0, 0]
    assert prompt_block_ranks(3, [9, 9, 9], "zigzag") == [0, 1, 2]
    assert prompt_block_ranks(5, [9], "zigzag") == [0] * 5


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_zigzag_balances_causal_work(num_ranks):
    num_blocks = 16 * num_ranks
    ranks = prompt_block_ranks(num_blocks, [num_blocks] * num_ranks, "zigzag")
    work = [sum(i + 1 for i, r in enumerate(ranks) if r == rank) for rank in range(num_ranks)]
    assert max(work) == min(work)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 130), FREE, st.sampled_from(["contiguous", "zigzag", "striped"]))
def test_block_ranks_agree_with_shard_sizes(num_blocks, free, layout):
    ranks = prompt_block_ranks(num_blocks, free, layout)
    sizes = shard_sizes(num_blocks, free)
    if sizes is None:
        assert ranks is None
    else:
        assert [ranks.count(rank) for rank in range(len(free))] == sizes
        assert len(ranks) == num_blocks


def test_stripes_put_every_chunk_on_all_ranks():
    assert prompt_block_ranks(7, [9, 9], "striped") == [0, 1, 0, 1, 0, 1, 0]
    assert prompt_block_ranks(9, [9, 9], "striped", [2]) == [0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert prompt_block_ranks(7, [2, 9, 1], "striped", [3]) == [0, 0, 1, 1, 1, 2, 1]
    assert prompt_block_ranks(11, [9, 9], "striped", [3, 1]) == [0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0]
    ranks = prompt_block_ranks(64, [64] * 4, "striped", [2])
    assert all(set(ranks[first : first + 8]) == {0, 1, 2, 3} for first in range(56))


def test_unknown_layout_is_a_bug():
    with pytest.raises(AssertionError, match="diagonal"):
        prompt_block_ranks(3, [9], "diagonal")


@pytest.mark.parametrize(
    ("num_tails", "free", "rank"),
    [
        ([2, 1, 3], [5, 1, 9], 1),
        ([2, 1, 3], [5, 0, 9], 0),
        ([1, 1, 1], [5, 7, 7], 1),
        ([0, 0], [4, 4], 0),
        ([0, 9], [0, 1], 1),
        ([0, 0], [0, 0], None),
    ],
)
def test_next_block_goes_to_the_fewest_tails_then_the_most_free(num_tails, free, rank):
    assert next_block_rank(num_tails, free) == rank
