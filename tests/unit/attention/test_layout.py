import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sps2_mega.attention.layout import build_layout, group_heads, split_heads


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


@given(placements())
def test_every_token_is_in_exactly_one_place(placement):
    ranks, lengths, block_size, sp_size = placement
    layout = build_layout(ranks, lengths, block_size=block_size, sp_size=sp_size)
    assert sum(layout.counts) == sum(lengths)
    rank_major = []
    for rank in range(sp_size):
        local = 0
        for run in layout.local_runs(rank):
            assert run.local_start == local
            local += run.end - run.start
            for position in range(run.start, run.end):
                assert ranks[run.sequence][position // block_size] == rank
                rank_major.append((run.sequence, position))
        assert local == layout.counts[rank]
    in_sequence = [(s, p) for s, length in enumerate(lengths) for p in range(length)]
    index = layout.rank_major_index()
    index = np.arange(len(in_sequence)) if index is None else index
    assert [rank_major[i] for i in index] == in_sequence
    assert layout.seq_starts() == [in_sequence.index((s, 0)) for s in range(len(lengths))]


def test_orders_that_agree_need_no_index():
    assert build_layout([[0, 0, 1]], [11], block_size=4, sp_size=2).rank_major_index() is None
    assert build_layout([[1, 0]], [8], block_size=4, sp_size=2).rank_major_index() is not None


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
