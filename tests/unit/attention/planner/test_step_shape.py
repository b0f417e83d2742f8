from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.planner.step_shape import step_shape

HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=8, itemsize=4)


def test_two_sequences_one_of_them_cached():
    # Blocks of 4: sequence 0 has 10 tokens on ranks 0, 1, 1; of sequence 1 (7 tokens on 2, 0) 5 are
    # cached.
    layout = build_layout([[0, 1, 1], [2, 0]], [10, 7], starts=[0, 5], block_size=4, sp_size=3)
    shape = step_shape(layout, **HEADS)
    assert shape.queries == (6, 6, 0)
    assert shape.keys == (7, 6, 4)
    assert shape.pairs == ((10 + 3 + 2, 0, 2 * 4), (6 * 4, 21, 0), (0, 0, 0))
    # Rank 0: 4 queries of sequence 0 against their own block, 2 of sequence 1 against 4 cached keys
    # on rank 2, one cached key beside them, and themselves.
    assert shape.calls == ((3, 0, 1), (1, 1, 0), (0, 0, 0))
    assert shape.partial_rows == ((4 + 2 + 2, 0, 2), (6, 6, 0), (0, 0, 0))
    assert shape.partials(0, 2) == (1, 2)


def test_zigzag_halves_are_balanced_and_contiguous_ones_are_not():
    def rows(ranks):
        layout = build_layout([ranks], [64], block_size=16, sp_size=2)
        return [sum(row) for row in step_shape(layout, **HEADS).pairs]

    assert rows([0, 1, 1, 0]) == [1040, 1040]
    assert rows([0, 0, 1, 1]) == [528, 1552]
    assert sum(rows([0, 0, 1, 1])) == 64 * 65 // 2
