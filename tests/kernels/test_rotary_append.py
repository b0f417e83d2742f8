"""Fused rotary embedding and cache append: reference against Megatron, Triton against reference."""

import pytest
import torch
from triton_device import DEVICES

from sps2_mega.kernels.backend import Backend
from sps2_mega.kernels.rotary_append import dispatch, reference

TYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    # tokens, query heads, KV heads, width, rotated pairs, block size
    (1, 1, 1, 64, 32, 1),
    (7, 8, 2, 96, 48, 5),
    (3, 8, 1, 128, 64, 16),
    (5, 40, 40, 64, 9, 3),  # several tiles of heads; most of a head stays as it is
    (2, 3, 3, 6, 0, 4),  # nothing is rotated
    (0, 4, 2, 16, 8, 4),
]


def made(shape, dtype, device):
    """q, k and v as in a packed projection, caches with a mark, and slots in random order."""
    tokens, heads, kv_heads, width, pairs, block_size = shape
    packed = torch.randn(tokens, heads + 2 * kv_heads + 1, width, device=device).to(dtype)
    q, k, v, _ = packed.split([heads, kv_heads, kv_heads, 1], 1)
    num_blocks = -(-(tokens + 3) // block_size)
    cache = torch.full((2, num_blocks, block_size, kv_heads, width), 7.0, device=device).to(dtype)
    slots = torch.randperm(num_blocks * block_size, device=device)[:tokens]
    angles = 1e4 * torch.rand(tokens, pairs, device=device)
    return (q, k, v), cache, slots, (angles.cos().to(dtype), angles.sin().to(dtype))


def results(form, heads, cache, slots, rotation, **options):
    q, k, v = (x.clone() for x in heads)
    k_cache, v_cache = cache.clone()
    form(q, k, v, k_cache, v_cache, slots, cos_TR=rotation[0], sin_TR=rotation[1], **options)
    return q, k, v, k_cache, v_cache


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_the_reference_is_megatrons_unfused_form_to_the_last_bit(shape, interleaved, dtype):
    rope_utils = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    heads, cache, slots, _ = made(shape, dtype, "cpu")
    angles = 100 * torch.rand(shape[0], shape[4])
    both = torch.stack((angles, angles), -1) if interleaved else torch.stack((angles, angles), 1)
    of_megatron = [
        rope_utils._apply_rotary_pos_emb_bshd(
            x[:, None], both.flatten(1)[:, None, None], rotary_interleaved=interleaved
        ).squeeze(1)
        for x in heads[:2]
    ]
    rotation = angles.cos().to(dtype), angles.sin().to(dtype)
    q, k, v, k_cache, v_cache = results(
        reference.rotate_and_append, heads, cache, slots, rotation, interleaved=interleaved
    )
    assert torch.equal(q, of_megatron[0]) and torch.equal(k, of_megatron[1])
    assert torch.equal(v, heads[2])
    assert torch.equal(k_cache.flatten(0, 1)[slots], k)
    assert torch.equal(v_cache.flatten(0, 1)[slots], v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_gives_the_references_bits(shape, interleaved, dtype, device):
    triton = pytest.importorskip("sps2_mega.kernels.rotary_append.triton")
    given = made(shape, dtype, device)
    expected = results(reference.rotate_and_append, *given, interleaved=interleaved)
    found = results(triton.rotate_and_append, *given, interleaved=interleaved)
    # Triton's interpreter truncates to bfloat16 where devices round:
    # three times, for values below 8.
    cut = dtype == torch.bfloat16 and device == "cpu"
    for new, old in zip(found, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=3 * 2**-5 if cut else 0)


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_in_a_packed_projection_and_nowhere_for_a_negative_slot(device):
    triton = pytest.importorskip("sps2_mega.kernels.rotary_append.triton")
    packed = torch.randn(3, 7, 16, device=device)
    before = packed.clone()
    q, k, v = packed[:, :4], packed[:, 4:5], packed[:, 5:6]
    k_cache, v_cache = torch.full((2, 2, 4, 1, 16), 7.0, device=device)
    angles = torch.rand(3, 8, device=device)
    rotation = dict(cos_TR=angles.cos(), sin_TR=angles.sin())
    slots = torch.tensor([-1, 5, -1], device=device)
    triton.rotate_and_append(q, k, v, k_cache, v_cache, slots, **rotation)
    for x in (before[:, :4], before[:, 4:5]):
        reference.rotate(x, **rotation)
    assert torch.equal(packed, before)
    for cache, new in ((k_cache, k), (v_cache, v)):
        slots_SKH = cache.flatten(0, 1)
        assert torch.equal(slots_SKH[5], new[1])
        assert (slots_SKH[:5] == 7.0).all() and (slots_SKH[6:] == 7.0).all()


def test_the_dispatcher_takes_both_forms():
    pytest.importorskip("triton")
    given = made(SHAPES[1], torch.float32, "cpu")
    by_torch, by_triton = (
        results(dispatch.rotate_and_append, *given, backend=form) for form in Backend
    )
    assert all(torch.equal(a, b) for a, b in zip(by_torch, by_triton, strict=True))


def test_what_does_not_belong_together_is_refused():
    triton = pytest.importorskip("sps2_mega.kernels.rotary_append.triton")
    (q, k, v), cache, slots, (cos, sin) = made((3, 4, 2, 8, 4, 2), torch.float32, "cpu")

    def refused(match, q=q, k=k, slots=slots, cos=cos):
        with pytest.raises(ValueError, match=match):
            triton.rotate_and_append(q, k, v, *cache, slots, cos_TR=cos, sin_TR=sin)

    refused(r"q is torch\.float64", q=q.double())
    refused(r"cos is torch\.float16, q is torch\.float32", cos=cos.half())
    refused(r"heads: q \(4, 8\), k \(2, 6\)", k=k[..., :6])
    refused(r"have \[3, 3, 3, 2, 3, 3\] tokens", slots=slots[:2])
    refused("at most 4 pairs", cos=torch.ones(3, 5))
