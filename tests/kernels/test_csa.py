from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import DEVICES, assert_partial_close

from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.attention.planner.sparse_volume import visible_keys
from sps2_mega.kernels.attention.reference import attend_run
from sps2_mega.kernels.csa import reference, sdpa
from sps2_mega.kernels.csa.batches import batch_pieces, split_triangles
from sps2_mega.kernels.csa.piece import Piece

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def csa(degrees, spans, sinks=0, halo=0, tail=0, sample_queries=False):
    return CSAPattern(
        degrees=degrees,
        spans=spans,
        sinks=sinks,
        halo=halo,
        tail=tail,
        sample_queries=sample_queries,
    )


def random_qkv(num_q, num_k, heads, kv_heads, width, dtype, device="cpu"):
    return (
        torch.randn(num_q, heads, width).to(device, dtype),
        torch.randn(num_k, kv_heads, width).to(device, dtype),
        torch.randn(num_k, kv_heads, width).to(device, dtype),
    )


def by_definition(pattern, qkv, *, length, layer, first_kv_head=0, q_start=0):
    return reference.attend_csa(
        *qkv,
        scale=0.21,
        degrees=pattern.degrees,
        spans=pattern.spans,
        sinks=pattern.sinks,
        halo=pattern.halo,
        exact_from=length - pattern.tail,
        sample_queries=pattern.sample_queries,
        layer=layer,
        first_kv_head=first_kv_head,
        q_start=q_start,
    )


def by_pieces(attend, pattern, qkv, *, length, layer, first_kv_head=0, q_start=0):
    pieces = csa_pieces(
        pattern,
        prompt_len=length,
        queries=range(q_start, q_start + len(qkv[0])),
        keys=range(len(qkv[1])),
        kv_heads=range(first_kv_head, first_kv_head + qkv[1].shape[1]),
        layer=layer,
    )
    return attend(*qkv, pieces, scale=0.21, q_start=q_start)


CASES = [
    # pattern, prompt length, first query, query heads, KV heads, layer
    (csa((1, 4), (64,), sinks=16, halo=24, tail=9), 517, 0, 8, 4, 0),
    (csa((1, 4), (64,), sinks=16, halo=24, tail=9), 517, 301, 8, 4, 3),
    (csa((1, 2, 4), (31, 93), sinks=3, halo=40), 400, 0, 6, 6, 1),
    (csa((1, 3), (50,), halo=7, sample_queries=True), 333, 0, 4, 2, 5),
    (csa((2, 3, 5), (17, 60), sinks=4, halo=5, tail=2), 211, 13, 9, 3, 2),
    (csa((4, 4), (9,), sample_queries=True), 63, 0, 4, 2, 1),  # rows that see no key
    (csa((1, 8), (1000,)), 300, 0, 4, 1, 0),  # shorter than a span
    (csa((7,), ()), 100, 0, 2, 1, 4),  # a stride over everything
    (csa((1, 4), (64,), halo=16), 640, 0, 16, 8, 0),  # all cells alike
    (csa((1, 2), (1,), sinks=1), 1, 0, 2, 2, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("pattern", "length", "q_start", "heads", "kv_heads", "layer"), CASES)
def test_pieces_equal_the_definition(
    pattern, length, q_start, heads, kv_heads, layer, dtype, device
):
    qkv = random_qkv(length - q_start, length, heads, kv_heads, 24, dtype, device)
    where = dict(length=length, layer=layer, first_kv_head=3, q_start=q_start)
    expected = by_definition(pattern, qkv, **where)
    assert_partial_close(by_pieces(sdpa.attend_pieces, pattern, qkv, **where), expected)
    assert_partial_close(by_pieces(reference.attend_pieces, pattern, qkv, **where), expected)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.lists(st.integers(1, 40), min_size=2, max_size=2).map(sorted),
    st.tuples(st.integers(0, 9), st.integers(0, 50), st.integers(0, 9), st.booleans()),
    st.tuples(st.integers(1, 150), st.integers(0, 149), st.integers(1, 5), st.integers(1, 3)),
    st.integers(0, 7),
)
def test_any_pattern_equals_the_definition(degrees, spans, options, sizes, layer):
    pattern = csa(tuple(degrees), tuple(spans[: len(degrees) - 1]), *options)
    length, q_start, kv_heads, repeats = sizes
    q_start = min(q_start, length)
    qkv = random_qkv(length - q_start, length, kv_heads * repeats, kv_heads, 8, torch.float32)
    where = dict(length=length, layer=layer, first_kv_head=layer % 3, q_start=q_start)
    assert_partial_close(
        by_pieces(sdpa.attend_pieces, pattern, qkv, **where),
        by_definition(pattern, qkv, **where),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_start", [0, 77])
def test_degrees_of_one_are_exact_attention(q_start, dtype):
    pattern = csa((1, 1, 1), (30, 60), sinks=5, halo=8, tail=3)
    qkv = random_qkv(173 - q_start, 173, 6, 2, 16, dtype)
    actual = by_pieces(sdpa.attend_pieces, pattern, qkv, length=173, layer=1, q_start=q_start)
    assert_partial_close(actual, attend_run(*qkv, scale=0.21, q_start=q_start))


def test_rows_without_keys_are_empty_and_never_nan():
    qkv = random_qkv(5, 11, 4, 2, 8, torch.float32)
    out, lse = sdpa.attend_pieces(*qkv, [Piece(range(1, 3), range(0, 11, 2), range(1, 2))], scale=1)
    assert (lse[1:3, 2:].isfinite()).all()
    lse[1:3, 2:], out[1:3, 2:] = -torch.inf, 0
    assert (lse == -torch.inf).all()
    assert (out == 0).all()


def test_no_pieces_no_rows_no_keys():
    q, k, v = random_qkv(3, 0, 4, 2, 8, torch.bfloat16)
    out, lse = sdpa.attend_pieces(q, k, v, [], scale=1.0)
    assert out.dtype == torch.bfloat16
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert sdpa.attend_pieces(q[:0], k, v, [], scale=1.0)[1].shape == (0, 4)
    no_heads = [x[:, :0] for x in random_qkv(9, 9, 4, 2, 8, torch.float32)]
    where = dict(length=9, layer=0)
    assert by_pieces(sdpa.attend_pieces, csa((1, 2), (4,)), no_heads, **where)[1].shape == (9, 0)


def test_views_of_a_packed_projection_are_read_in_place():
    """Heads of q, k and v are adjacent in memory; neighbours that must not be read are NaN."""
    length, heads, kv_heads, width = 130, 4, 2, 16
    packed = torch.randn(length + 2, heads + 2 * kv_heads + 1, width)
    packed[0], packed[-1], packed[:, -1] = torch.nan, torch.nan, torch.nan
    views = packed[1:-1, :-1].split([heads, kv_heads, kv_heads], 1)
    pattern = csa((1, 4), (32,), sinks=2, halo=9, tail=3)
    where = dict(length=length, layer=2)
    expected = by_definition(pattern, [x.contiguous() for x in views], **where)
    assert_partial_close(by_pieces(sdpa.attend_pieces, pattern, views, **where), expected)
    reversed_width = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in views]
    assert_partial_close(by_pieces(sdpa.attend_pieces, pattern, reversed_width, **where), expected)


def test_only_the_keys_that_travel_are_read():
    """Rows that no query sees may hold anything, as in a buffer with received rows only."""
    length, q_start, layer = 300, 128, 1
    pattern = csa((1, 3), (64,), sinks=5, halo=10, tail=0)
    q, k, v = random_qkv(length - q_start, length, 8, 4, 16, torch.float32)
    needed = visible_keys(
        pattern,
        prompt_len=length,
        queries=range(q_start, length),
        keys=range(length),
        kv_heads=range(4),
        layer=layer,
    )
    hidden = torch.ones(length, 4, dtype=torch.bool)
    for part in needed:
        hidden[torch.tensor(part.keys)[:, None], torch.tensor(part.kv_heads)] = False
    assert hidden.any()
    where = dict(length=length, layer=layer, q_start=q_start)
    expected = by_definition(pattern, (q, k, v), **where)
    k[hidden], v[hidden] = torch.nan, torch.nan
    assert_partial_close(by_pieces(sdpa.attend_pieces, pattern, (q, k, v), **where), expected)


def test_keys_compacted_for_travel_give_the_same():
    """Only every 4th key of a far cell arrives: the same rectangle with step 1."""
    q, k, v = random_qkv(40, 64, 4, 1, 16, torch.float32)
    whole = sdpa.attend_pieces(
        q, k, v, [Piece(range(64, 104), range(3, 64, 4), range(1))], scale=0.3, q_start=64
    )
    compact = sdpa.attend_pieces(
        q, k[3::4], v[3::4], [Piece(range(64, 104), range(16), range(1))], scale=0.3, q_start=64
    )
    assert_partial_close(compact, whole)


def test_huge_scores_do_not_overflow():
    pattern = csa((1, 2), (16,), sinks=1)
    q, k, v = random_qkv(70, 70, 2, 2, 8, torch.float32)
    where = dict(length=70, layer=0)
    out, lse = by_pieces(sdpa.attend_pieces, pattern, (q * 200, k, v), **where)
    expected_out, expected_lse = by_definition(pattern, (q * 200, k, v), **where)
    # Scores are in the hundreds, where float32 itself is accurate to 3e-5.
    torch.testing.assert_close(out, expected_out, rtol=0, atol=2e-4)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece(range(2, 6), range(3), range(2)), r"queries 2..5, the tensor has \[1, 5\)"),
        (Piece(range(1, 4), range(0, 9, 8), range(2)), r"keys 0..8, the tensor has \[0, 7\)"),
        (Piece(range(1, 4), range(3), range(0, 3, 2)), r"KV heads 0..2, the tensor has \[0, 2\)"),
    ],
)
def test_pieces_outside_the_tensors_are_refused(piece, message):
    qkv = random_qkv(4, 7, 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        sdpa.attend_pieces(*qkv, [piece], scale=1.0, q_start=1)


def unbatched(batch):
    for n in range(batch.count):
        for t in range(len(batch.first.queries)):
            keys = batch.first.keys[: t + 1] if batch.first.causal else batch.first.keys
            for key in keys:
                for head in batch.first.kv_heads:
                    yield (
                        batch.first.queries[t] + n * batch.query_step,
                        key + n * batch.key_step,
                        head + n * batch.head_step,
                    )


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 9), st.integers(1, 9), st.booleans())
def test_batches_hold_every_pair_once_and_fresh_ones_come_first(
    degree, span, halo, kv_heads, sampled
):
    pattern = csa((1, degree), (span,), sinks=2, halo=halo, tail=3, sample_queries=sampled)
    pieces = csa_pieces(
        pattern, prompt_len=37, queries=range(37), kv_heads=range(kv_heads), layer=1
    )
    seen, touched = Counter(), set()
    for batch in batch_pieces(pieces):
        pairs = list(unbatched(batch))
        rows = {(query, head) for query, _, head in pairs}
        assert not batch.fresh or not rows & touched
        touched |= rows
        seen.update(pairs)
    assert set(seen.values()) == {1}
    assert len(seen) == sum(piece.num_pairs * len(piece.kv_heads) for piece in pieces)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 3), st.integers(1, 9))
def test_split_triangles_are_small_and_hold_the_same_pairs(rows, step, offset, longest):
    queries = range(offset, offset + rows * step, step)
    keys = range(0, rows * step, step)
    pieces = split_triangles([Piece(queries, keys, range(2), causal=True)], longest)
    assert all(len(piece.queries) <= longest for piece in pieces if piece.causal)
    pairs = [
        (i, j)
        for piece in pieces
        for t, i in enumerate(piece.queries)
        for j in (piece.keys[: t + 1] if piece.causal else piece.keys)
    ]
    assert sorted(pairs) == [(i, j) for t, i in enumerate(queries) for j in keys[: t + 1]]


def test_long_triangles_equal_the_definition():
    """Triangles longer than one call computes on a CPU, whole and with a stride."""
    for degrees in ((1, 4), (2, 3)):
        pattern = csa(degrees, (300,), sinks=7, halo=33, tail=20)
        qkv = random_qkv(811, 811, 2, 1, 8, torch.float32)
        where = dict(length=811, layer=1)
        assert_partial_close(
            by_pieces(sdpa.attend_pieces, pattern, qkv, **where),
            by_definition(pattern, qkv, **where),
        )


def test_cells_of_one_span_share_calls():
    pattern = csa((1, 4), (128,), sinks=16, halo=32)
    pieces = csa_pieces(pattern, prompt_len=1024, queries=range(1024), kv_heads=range(8), layer=0)
    batches = batch_pieces(pieces)
    triangles = [batch for batch in batches if batch.first.causal]
    halos = [batch for batch in batches if len(batch.first.keys) == 32]
    assert [batch.count for batch in triangles] == [8]
    assert [batch.count for batch in halos] == [7]
    far = [batch for batch in batches if batch.first.keys.step == 4]
    assert {(batch.count, batch.head_step) for batch in far} == {(2, 4)}
    assert len(far) == 4 * 7
