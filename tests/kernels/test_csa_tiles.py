import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.kernels.csa.piece import Piece
from sps2_mega.kernels.csa.tile_shape import fits, num_parts, padded_width, tile_shape
from sps2_mega.kernels.csa.tiles import plan_tiles


def seen_by_plan(plan, num_q, num_k, num_heads, q_minus_k):
    """Count how often each (head, query row, key row) is computed and each row is written."""
    seen = np.zeros((num_heads, num_q, num_k), dtype=int)
    written = np.zeros((plan.num_parts, num_heads, num_q), dtype=int)
    for head, first, step, count, begin, end, part in plan.tiles.tolist():
        rows = range(first, first + step * count, step)
        written[part, head, rows] += 1
        for k_first, k_step, k_count, causal in plan.segments[begin:end].tolist():
            for row in rows:
                visible = k_count
                if causal:
                    assert row + q_minus_k >= k_first, "the kernel divides without a sign"
                    visible = min(k_count, (row + q_minus_k - k_first) // k_step + 1)
                seen[head, row, k_first : k_first + visible * k_step : k_step] += 1
    return seen, written


def seen_by_pieces(pieces, num_q, num_k, num_heads, q_start, k_start):
    seen = np.zeros((num_heads, num_q, num_k), dtype=int)
    for piece in pieces:
        for head in piece.kv_heads:
            for t, query in enumerate(piece.queries):
                keys = piece.keys[: t + 1] if piece.causal else piece.keys
                seen[head, query - q_start, np.array(keys) - k_start] += 1
    return seen


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.lists(st.integers(1, 40), min_size=2, max_size=2).map(sorted),
    st.tuples(st.integers(0, 9), st.integers(0, 50), st.integers(0, 9), st.booleans()),
    st.tuples(st.integers(1, 150), st.integers(0, 149), st.integers(0, 20), st.integers(1, 3)),
    st.tuples(st.integers(1, 40), st.integers(1, 4)),
)
def test_tiles_compute_each_pair_of_the_pieces_once(degrees, spans, options, sizes, cuts):
    sinks, halo, tail, sample = options
    pattern = CSAPattern(
        degrees=tuple(degrees),
        spans=tuple(spans[: len(degrees) - 1]),
        sinks=sinks,
        halo=halo,
        tail=tail,
        sample_queries=sample,
    )
    length, q_start, k_start, heads = sizes
    q_start, k_start = min(q_start, length), min(k_start, length)
    queries, keys = range(q_start, length), range(k_start, length)
    pieces = csa_pieces(
        pattern, prompt_len=length, queries=queries, keys=keys, kv_heads=range(heads), layer=1
    )
    tile_queries, parts = cuts
    plan = plan_tiles(
        pieces,
        queries=queries,
        keys=keys,
        num_kv_heads=heads,
        tile_queries=tile_queries,
        num_parts=parts,
    )
    shape = (len(queries), len(keys), heads)
    seen, written = seen_by_plan(plan, *shape, q_start - k_start)
    assert (seen == seen_by_pieces(pieces, *shape, q_start, k_start)).all()
    assert (written == 1).all()
    assert (plan.tiles[:, 3] <= tile_queries).all()


def test_long_tiles_come_first_and_parts_share_the_keys():
    pieces = [Piece(range(512), range(512), range(2), causal=True)]
    where = dict(queries=range(512), keys=range(512), num_kv_heads=2, tile_queries=128)
    assert plan_tiles(pieces, **where).tiles[:, 1].tolist() == [384, 384, 256, 256, 128, 128, 0, 0]
    rectangle = [Piece(range(600, 604), range(1, 600, 2), range(1))]
    where = dict(queries=range(600, 604), keys=range(600), num_kv_heads=1, tile_queries=8)
    plan = plan_tiles(rectangle, **where, num_parts=2)
    assert plan.segments.tolist() == [[1, 2, 256, 0], [513, 2, 44, 0]]
    assert plan.tiles[:, 6].tolist() == [0, 1]


def test_nothing_to_see_is_still_written():
    plan = plan_tiles([], queries=range(5, 12), keys=range(0), num_kv_heads=2, tile_queries=4)
    _, written = seen_by_plan(plan, 7, 0, 2, 5)
    assert (written == 1).all()
    empty = plan_tiles([], queries=range(0), keys=range(3), num_kv_heads=2, tile_queries=4)
    assert empty.tiles.shape == (0, 7)
    assert empty.segments.shape == (0, 4)


@pytest.mark.parametrize("width", [1, 24, 64, 80, 128, 129, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_into_shared_memory(width, itemsize):
    shape = tile_shape(width, itemsize)
    in_flight = 2 * shape.stages * shape.keys + shape.rows
    assert in_flight * padded_width(width) * itemsize <= 160 * 1024
    assert shape.stages >= 2
    assert shape.rows % 16 == 0 and shape.keys % 16 == 0


def test_what_has_no_tile_is_refused():
    with pytest.raises(ValueError, match="head width 257"):
        tile_shape(257, 2)
    assert fits(128, 2, 128)
    assert not fits(128, 2, 129)
    assert not fits(512, 2, 1)


@pytest.mark.parametrize(
    ("tiles", "keys", "expected"),
    [(0, 0, 1), (132, 10**6, 1), (32, 131072, 9), (1, 131072, 32), (1, 2047, 1), (1, 4096, 4)],
)
def test_few_tiles_with_many_keys_are_divided(tiles, keys, expected):
    assert num_parts(tiles, keys, 132) == expected
