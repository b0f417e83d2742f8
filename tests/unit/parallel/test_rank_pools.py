"""How the ranks of a job are cut into sides, and what is said when they cannot be."""

from __future__ import annotations

import pytest

from sps2_mega.config import ParallelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.rank_pools import rank_pool_of, split_rank_pools


def test_without_decode_ranks_there_is_one_side():
    (side,) = split_rank_pools(ParallelConfig(tp=2, sp=3), 6)
    assert (side.name, side.tp, side.sp, list(side.global_ranks)) == ("all", 2, 3, list(range(6)))


def test_the_last_ranks_decode_in_a_shape_of_their_own():
    prefill, decode = split_rank_pools(ParallelConfig(tp=1, sp=3, decode_ranks=4, decode_tp=2), 7)
    assert (prefill.name, list(prefill.global_ranks)) == ("prefill", [0, 1, 2])
    assert (decode.name, decode.tp, decode.sp) == ("decode", 2, 2)
    assert [decode.global_rank(tp_rank=t, sp_rank=s) for s in (0, 1) for t in (0, 1)] == [
        3,
        4,
        5,
        6,
    ]
    assert [rank_pool_of((prefill, decode), rank).name for rank in range(7)] == 3 * [
        "prefill"
    ] + 4 * ["decode"]


def test_decode_tp_is_that_of_prefill_unless_given():
    _, decode = split_rank_pools(ParallelConfig(tp=2, sp=1, decode_ranks=2), 4)
    assert (decode.tp, decode.sp) == (2, 1)


@pytest.mark.parametrize(
    ("parallel", "world_size", "text"),
    [
        (dict(tp=2, sp=2), 3, r"tp=2 \* sp=2 = 4, but 3 ranks were started"),
        (dict(tp=2, sp=2, decode_ranks=2), 5, r"tp=2 \* sp=2 \+ decode_ranks=2 = 6, but 5 ranks"),
        (dict(sp=2, decode_ranks=3, decode_tp=2), 5, "decode_ranks=3, decode_tp=2$"),
        (dict(tp=2, decode_ranks=3), 5, r"decode_ranks=3, decode_tp=2 \(from tp\)"),
        (dict(decode_ranks=-1), 1, "decode_ranks=-1"),
        (dict(decode_ranks=1, decode_tp=0), 2, "decode_tp=0"),
        (dict(decode_tp=2), 1, "decode_tp=2 needs decode_ranks"),
        (dict(tp=0, decode_ranks=1), 1, "tp=0"),
    ],
)
def test_what_does_not_add_up_is_named(parallel, world_size, text):
    with pytest.raises(ConfigError, match=text):
        split_rank_pools(ParallelConfig(**parallel), world_size)
