import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sps2_mega.attention.layout.heads import group_heads, split_heads
from sps2_mega.attention.layout.token_layout import build_layout


@st.composite
def placements(draw):
    block_size = draw(st.integers(1, 5))
    sp_size = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 23), max_size=4))
    ranks = [
        draw(
            st.lists(
                st.integers(0, sp_size - 1),
                min_size=-(-length // block_size),
                max_size=-(-length // block_size) + 2,  # spare blocks hold no tokens yet
            )
        )
        for length in lengths
    ]
    return ranks, lengths, block_size, sp_size


@given(placements(), st.data())
def test_every_token_is_in_exactly_one_place(placement, data):
    ranks, lengths, block_size, sp_size = placement
    starts = [data.draw(st.integers(0, length - 1)) for length in lengths]
    layout = build_layout(ranks, lengths, starts=starts, block_size=block_size, sp_size=sp_size)
    zeros = [0] * len(lengths)
    for tokens, firsts in ((layout.queries, starts), (layout.keys, zeros)):
        expected = [(s, p) for s, end in enumerate(lengths) for p in range(firsts[s], end)]
        assert sum(tokens.counts) == len(expected)
        rank_major = []
        for rank in range(sp_size):
            local = {}
            for run in tokens.local_runs(rank):
                for offset, position in enumerate(range(run.start, run.end)):
                    assert ranks[run.sequence][position // block_size] == rank
                    local[run.local_start + offset] = (run.sequence, position)
            assert sorted(local) == list(range(tokens.counts[rank]))
            rank_major += [local[i] for i in range(len(local))]
        index = tokens.rank_major_index()
        index = np.arange(len(expected)) if index is None else index
        assert [rank_major[i] for i in index] == expected
        assert tokens.seq_starts() == [expected.index((s, p)) for s, p in enumerate(firsts)]


@given(placements(), st.data())
def test_local_keys_are_the_cached_ones_and_then_the_queries(placement, data):
    ranks, lengths, block_size, sp_size = placement
    starts = [data.draw(st.integers(0, length - 1)) for length in lengths]
    layout = build_layout(ranks, lengths, starts=starts, block_size=block_size, sp_size=sp_size)
    for rank in range(sp_size):
        cached = layout.keys.counts[rank] - layout.queries.counts[rank]
        new = [run for run in layout.keys.local_runs(rank) if run.local_start >= cached]
        queries = layout.queries.local_runs(rank)
        assert [(r.sequence, r.start, r.end, r.local_start - cached) for r in new] == [
            (r.sequence, r.start, r.end, r.local_start) for r in queries
        ]
        for run in layout.keys.local_runs(rank):
            assert run in new or run.end <= starts[run.sequence]


def test_orders_that_agree_need_no_index():
    in_order = build_layout([[0, 0, 1]], [11], block_size=4, sp_size=2)
    assert in_order.keys.rank_major_index() is None and in_order.queries is in_order.keys
    turned = build_layout([[1, 0]], [8], block_size=4, sp_size=2)
    assert turned.keys.rank_major_index() is not None


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 9))
def test_heads_are_dealt_once_with_the_kv_heads_they_need(num_kv_heads, repeats, num_ranks):
    num_heads = num_kv_heads * repeats
    shares = split_heads(num_heads, num_kv_heads, num_ranks)
    assert [head for heads, _ in shares for head in heads] == list(range(num_heads))
    assert max(len(heads) for heads, _ in shares) - min(len(heads) for heads, _ in shares) <= 1
    for heads, kv_heads in shares:
        assert set(kv_heads) == {head // repeats for head in heads}
        pieces = group_heads(heads, repeats)
        assert [head for queries, _ in pieces for head in queries] == list(heads)
        for queries, kv_head in pieces:
            assert {head // repeats for head in queries} == {kv_head}
