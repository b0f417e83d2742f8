import pytest
import torch
from tolerances import assert_partial_close
from triton_device import DEVICES, DEVICES_AND_TYPES

from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.kernels.csa import reference
from sps2_mega.kernels.csa.piece import Piece

pytest.importorskip("triton")
from sps2_mega.kernels.csa import device_tables
from sps2_mega.kernels.csa import triton as kernels


def csa(degrees, spans, sinks=0, halo=0, tail=0, sample_queries=False):
    return CSAPattern(
        degrees=degrees,
        spans=spans,
        sinks=sinks,
        halo=halo,
        tail=tail,
        sample_queries=sample_queries,
    )


def random_qkv(num_q, num_k, heads, kv_heads, width, dtype, device):
    return (
        torch.randn(num_q, heads, width).to(device, dtype),
        torch.randn(num_k, kv_heads, width).to(device, dtype),
        torch.randn(num_k, kv_heads, width).to(device, dtype),
    )


def compare(pieces, qkv, **where):
    where["scale"] = qkv[0].shape[2] ** -0.5
    actual = kernels.attend_pieces(*qkv, pieces, **where)
    assert_partial_close(actual, reference.attend_pieces(*qkv, pieces, **where))
    return actual


CASES = [
    # pattern, prompt length, first query, query heads, KV heads, head width, layer
    (csa((1, 2), (1,), sinks=1), 1, 0, 2, 2, 16, 0),
    (csa((1, 2), (4,), sinks=1), 7, 0, 3, 1, 80, 1),  # 3 heads per group, width no power of two
    (csa((1, 4), (64,), sinks=5, halo=9, tail=3), 129, 0, 6, 2, 96, 3),
    (csa((1, 4), (64,), sinks=5, halo=9, tail=3), 129, 101, 2, 1, 256, 0),
    (csa((1, 2, 3), (19, 57), halo=40), 140, 50, 2, 2, 32, 1),
    (csa((1, 3), (50,), halo=7, sample_queries=True), 120, 0, 4, 2, 24, 5),
    (csa((2, 3), (37,), sinks=2, tail=2), 90, 13, 3, 3, 32, 2),
    (csa((4, 4), (9,), sample_queries=True), 40, 0, 2, 1, 16, 1),  # rows that see no key
    (csa((1,), ()), 129, 60, 4, 1, 64, 0),
]


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_TYPES)
@pytest.mark.parametrize(
    ("pattern", "length", "q_start", "heads", "kv_heads", "width", "layer"), CASES
)
def test_equals_reference(pattern, length, q_start, heads, kv_heads, width, layer, device, dtype):
    qkv = random_qkv(length - q_start, length, heads, kv_heads, width, dtype, device)
    pieces = csa_pieces(
        pattern,
        prompt_len=length,
        queries=range(q_start, length),
        kv_heads=range(kv_heads),
        layer=layer,
    )
    compare(pieces, qkv, q_start=q_start)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_keys_are_empty_and_never_nan(device):
    qkv = random_qkv(5, 11, 4, 2, 16, torch.float32, device)
    out, lse = compare([Piece(range(1, 3), range(0, 11, 2), range(1, 2))], qkv)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    out, lse = compare([], qkv)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_no_keys_no_heads(device):
    q, k, v = random_qkv(3, 0, 4, 2, 16, torch.float16, device)
    out, lse = kernels.attend_pieces(q, k, v, [], scale=1.0)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert kernels.attend_pieces(q[:0], k, v, [], scale=1.0)[1].shape == (0, 4)
    assert kernels.attend_pieces(q[:, :0], k[:, :0], v[:, :0], [], scale=1.0)[1].shape == (3, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_keys_divided_among_several_programs_give_the_same(device, monkeypatch):
    monkeypatch.setattr(device_tables, "num_parts", lambda *_: 3)
    device_tables.device_tables.cache_clear()
    q, k, v = random_qkv(9, 420, 4, 2, 32, torch.float16, device)
    exact = csa((1,), ())
    where = dict(prompt_len=420, queries=range(411, 420), kv_heads=range(2), layer=0)
    compare(csa_pieces(exact, **where), (q, k, v), q_start=411)
    compare([], (q, k, v), q_start=411)
    device_tables.device_tables.cache_clear()


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_read_in_place_and_what_no_query_sees_is_not(device):
    """Heads of q, k and v are adjacent in memory; rows that must not be read are NaN."""
    length, heads, kv_heads, width = 70, 4, 2, 16
    packed = torch.randn(length + 2, heads + 2 * kv_heads + 1, width, device=device)
    packed[0], packed[-1], packed[:, -1] = torch.nan, torch.nan, torch.nan
    q, k, v = packed[1:-1, :-1].split([heads, kv_heads, kv_heads], 1)
    pieces = [
        Piece(range(40, 70), range(1, 30, 3), range(2)),
        Piece(range(40, 70), range(40, 70), range(2), causal=True),
    ]
    expected = reference.attend_pieces(
        q[40:].contiguous(), k.contiguous(), v.contiguous(), pieces, scale=0.1, q_start=40
    )
    seen = {*range(1, 30, 3), *range(40, 70)}
    hidden = [row for row in range(length) if row not in seen]
    k[hidden], v[hidden] = torch.nan, torch.nan
    actual = kernels.attend_pieces(q[40:], k, v, pieces, scale=0.1, q_start=40)
    assert_partial_close(actual, expected)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q[40:], k, v)]
    assert_partial_close(kernels.attend_pieces(*turned, pieces, scale=0.1, q_start=40), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_huge_scores_do_not_overflow(device):
    q, k, v = random_qkv(40, 40, 2, 2, 16, torch.float32, device)
    piece = Piece(range(40), range(40), range(2), causal=True)
    actual = kernels.attend_pieces(q * 1000, k, v, [piece], scale=0.1)
    expected = reference.attend_pieces(q * 1000, k, v, [piece], scale=0.1)
    # Scores are in the hundreds, where float32 itself is accurate to 3e-5.
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4e-4)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece(range(2, 6), range(3), range(2)), r"queries 2..5, the tensor has \[1, 5\)"),
        (Piece(range(1, 4), range(0, 9, 8), range(2)), r"keys 0..8, the tensor has \[0, 7\)"),
        (Piece(range(1, 4), range(3), range(0, 3, 2)), r"KV heads 0..2, the tensor has \[0, 2\)"),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_pieces_outside_the_tensors_are_refused(piece, message, device):
    qkv = random_qkv(4, 7, 4, 2, 16, torch.float32, device)
    with pytest.raises(ValueError, match=message):
        kernels.attend_pieces(*qkv, [piece], scale=1.0, q_start=1)


def test_what_the_kernel_has_no_form_for_is_refused():
    q, k, v = random_qkv(4, 7, 4, 2, 16, torch.float32, "cpu")
    for qkv, scale, message in (
        ((q.double(), k.double(), v.double()), 1.0, "float64"),
        ((q, k.half(), v), 1.0, "float16"),
        ((q.bfloat16(), k.bfloat16(), v.bfloat16()), 1.0, "bfloat16 needs a CUDA device"),
        ((q[:, :3], k, v), 1.0, "3 query heads are no multiple of 2"),
        ((q, k, v[..., :8]), 1.0, r"v \(7, 2, 8\)"),
        ((q, k, v), -1.0, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.attend_pieces(*qkv, [], scale=scale)
