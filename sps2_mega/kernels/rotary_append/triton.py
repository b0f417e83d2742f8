"""Rotary embedding of new queries and keys, and append of keys and values, in one launch.

A program takes one token and a few of its heads: query heads, or KV heads with their values:

    program_id(1)   0 .. query tiles - 1: query heads    above: KV heads, of k, v and both caches

Queries and keys change in place: a program alone reads what it writes, and writes
after reading. Shapes: T tokens, N query heads, K KV heads, H head width, R
rotated pairs; in the kernel G heads of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_ELEMENTS = 2048  # 16 bytes for each of 128 threads, in 16-bit types


def rotate_and_append(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    *,
    cos_TR: Tensor,
    sin_TR: Tensor,
    interleaved: bool = False,
) -> None:
    """Rotate q and k in place and write k and v, as `reference.rotate_and_append`.

    A token with a negative slot is rotated but not written.

    Args:
        q_TNH: [T, N, H].
        k_TKH, v_TKH: [T, K, H].
        k_cache, v_cache: [blocks, block_size, K, H].
        slots_T: [T] slots, block * block_size + offset.
        cos_TR, sin_TR: [T, R], in q's type.
        interleaved: whether pair r is elements 2r and 2r + 1.

    Raises:
        ValueError: types, widths or token counts that do not match.
    """
    _check(q_TNH, k_TKH, v_TKH, k_cache, v_cache, slots_T, cos_TR, sin_TR)
    num_tokens, num_heads, width = q_TNH.shape
    num_kv_heads, num_pairs = k_TKH.shape[1], cos_TR.shape[1]
    if num_tokens == 0:
        return
    padded = triton.next_power_of_2(width)
    heads = max(1, _TILE_ELEMENTS // padded)
    query_tiles = triton.cdiv(num_heads, heads)
    _rotate_and_append_kernel[(num_tokens, query_tiles + triton.cdiv(num_kv_heads, heads))](
        q_TNH,
        k_TKH,
        v_TKH,
        k_cache,
        v_cache,
        slots_T,
        cos_TR,
        sin_TR,
        query_tiles,
        *q_TNH.stride(),
        *k_TKH.stride(),
        *v_TKH.stride(),
        *k_cache.stride(),
        *v_cache.stride(),
        slots_T.stride(0),
        *cos_TR.stride(),
        *sin_TR.stride(),
        BLOCK_SIZE=k_cache.shape[1],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        WIDTH=width,
        PADDED_WIDTH=padded,
        PAIRS=num_pairs,
        PADDED_PAIRS=triton.next_power_of_2(max(1, num_pairs)),
        INTERLEAVED=interleaved,
        HEADS=heads,
        # Contracting a product and a sum would round once where the unfused form rounds twice.
        enable_fp_fusion=False,
    )


def _check(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
) -> None:
    if q_TNH.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q is {q_TNH.dtype}: float32, float16 or bfloat16 is needed")
    for name, given in (
        ("k", k_TKH),
        ("v", v_TKH),
        ("the key cache", k_cache),
        ("the value cache", v_cache),
        ("cos", cos_TR),
        ("sin", sin_TR),
    ):
        if given.dtype != q_TNH.dtype:
            raise ValueError(f"{name} is {given.dtype}, q is {q_TNH.dtype}")
    heads = {tuple(x.shape[-2:]) for x in (k_TKH, v_TKH, k_cache, v_cache)}
    if len(heads) != 1 or k_TKH.shape[2] != q_TNH.shape[2]:
        raise ValueError(
            f"heads: q {tuple(q_TNH.shape[1:])}, k {tuple(k_TKH.shape[1:])}, "
            f"v {tuple(v_TKH.shape[1:])}, caches {tuple(k_cache.shape[2:])} and "
            f"{tuple(v_cache.shape[2:])}"
        )
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}")
    counts = [len(x) for x in (q_TNH, k_TKH, v_TKH, slots_T, cos_TR, sin_TR)]
    if len(set(counts)) != 1:
        raise ValueError(f"q, k, v, slots, cos and sin have {counts} tokens")
    if cos_TR.shape != sin_TR.shape or 2 * cos_TR.shape[1] > q_TNH.shape[2]:
        raise ValueError(
            f"cos {tuple(cos_TR.shape)} and sin {tuple(sin_TR.shape)}: "
            f"a head of {q_TNH.shape[2]} has at most {q_TNH.shape[2] // 2} pairs"
        )


@triton.jit
def _rotated(first, second, cos, sin):
    """Both elements of a pair, rounded to the heads' type after every operation as in torch."""
    dtype = first.dtype
    first32, second32 = first.to(tl.float32), second.to(tl.float32)
    cos32, sin32 = cos.to(tl.float32), sin.to(tl.float32)
    first_cos = (first32 * cos32).to(dtype).to(tl.float32)
    second_sin = (second32 * sin32).to(dtype).to(tl.float32)
    second_cos = (second32 * cos32).to(dtype).to(tl.float32)
    first_sin = (first32 * sin32).to(dtype).to(tl.float32)
    return (first_cos - second_sin).to(dtype), (second_cos + first_sin).to(dtype)


@triton.jit
def _pair_elements(r_R, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second element of each pair, counted within a head."""
    if INTERLEAVED:
        first_R, second_R = 2 * r_R, 2 * r_R + 1
    else:
        first_R, second_R = r_R, PAIRS + r_R
    return first_R, second_R


@triton.jit
def _rotate_heads(at_G1, stride_h, first_R, second_R, cos_R, sin_R, inside_GR):
    """Rotate the pairs of the heads at the pointers `at_G1` in place and return their elements."""
    first_at_GR = at_G1 + (first_R * stride_h)[None, :]
    second_at_GR = at_G1 + (second_R * stride_h)[None, :]
    first_GR, second_GR = _rotated(
        tl.load(first_at_GR, mask=inside_GR, other=0.0),
        tl.load(second_at_GR, mask=inside_GR, other=0.0),
        cos_R[None, :],
        sin_R[None, :],
    )
    tl.store(first_at_GR, first_GR, mask=inside_GR)
    tl.store(second_at_GR, second_GR, mask=inside_GR)
    return first_GR, second_GR


@triton.jit
def _copy(from_G1, from_stride_h, to_G1, to_stride_h, h_H, mask_GH):
    """Copy elements `h_H` of the heads at the pointers `from_G1` to those at `to_G1`."""
    x_GH = tl.load(from_G1 + (h_H * from_stride_h)[None, :], mask=mask_GH)
    tl.store(to_G1 + (h_H * to_stride_h)[None, :], x_GH, mask=mask_GH)


@triton.jit(do_not_specialize=["query_tiles"])
def _rotate_and_append_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    slots,
    cos,
    sin,
    query_tiles,
    q_stride_t,
    q_stride_n,
    q_stride_h,
    k_stride_t,
    k_stride_k,
    k_stride_h,
    v_stride_t,
    v_stride_k,
    v_stride_h,
    k_cache_stride_block,
    k_cache_stride_slot,
    k_cache_stride_k,
    k_cache_stride_h,
    v_cache_stride_block,
    v_cache_stride_slot,
    v_cache_stride_k,
    v_cache_stride_h,
    slots_stride,
    cos_stride_t,
    cos_stride_r,
    sin_stride_t,
    sin_stride_r,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    r_R = tl.arange(0, PADDED_PAIRS)
    cos_R = tl.load(cos + token * cos_stride_t + r_R * cos_stride_r, mask=r_R < PAIRS, other=0.0)
    sin_R = tl.load(sin + token * sin_stride_t + r_R * sin_stride_r, mask=r_R < PAIRS, other=0.0)
    first_R, second_R = _pair_elements(r_R, PAIRS, INTERLEAVED)
    if tile < query_tiles:
        head_G = tile * HEADS + tl.arange(0, HEADS)
        inside_GR = (head_G < NUM_HEADS)[:, None] & (r_R < PAIRS)[None, :]
        q_at_G1 = (q + token * q_stride_t + head_G * q_stride_n)[:, None]
        _rotate_heads(q_at_G1, q_stride_h, first_R, second_R, cos_R, sin_R, inside_GR)
    else:
        head_G = (tile - query_tiles) * HEADS + tl.arange(0, HEADS)
        inside_G = head_G < NUM_KV_HEADS
        inside_GR = inside_G[:, None] & (r_R < PAIRS)[None, :]
        k_at_G1 = (k + token * k_stride_t + head_G * k_stride_k)[:, None]
        first_GR, second_GR = _rotate_heads(
            k_at_G1, k_stride_h, first_R, second_R, cos_R, sin_R, inside_GR
        )

        slot = tl.load(slots + token * slots_stride).to(tl.int64)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        kept_G = inside_G & (slot >= 0)
        kept_GR = kept_G[:, None] & (r_R < PAIRS)[None, :]
        k_slot = k_cache + block * k_cache_stride_block + offset * k_cache_stride_slot
        k_to_G1 = (k_slot + head_G * k_cache_stride_k)[:, None]
        tl.store(k_to_G1 + (first_R * k_cache_stride_h)[None, :], first_GR, mask=kept_GR)
        tl.store(k_to_G1 + (second_R * k_cache_stride_h)[None, :], second_GR, mask=kept_GR)

        h_H = tl.arange(0, PADDED_WIDTH)
        if 2 * PAIRS < WIDTH:
            rest_GH = kept_G[:, None] & ((h_H >= 2 * PAIRS) & (h_H < WIDTH))[None, :]
            _copy(k_at_G1, k_stride_h, k_to_G1, k_cache_stride_h, h_H, rest_GH)
        inside_GH = kept_G[:, None] & (h_H < WIDTH)[None, :]
        v_at_G1 = (v + token * v_stride_t + head_G * v_stride_k)[:, None]
        v_slot = v_cache + block * v_cache_stride_block + offset * v_cache_stride_slot
        v_to_G1 = (v_slot + head_G * v_cache_stride_k)[:, None]
        _copy(v_at_G1, v_stride_h, v_to_G1, v_cache_stride_h, h_H, inside_GH)
