"""Rotary embedding of new queries and keys, and append of keys and values to the KV cache.

The order of operations, and so of roundings, follows Megatron's unfused rotary embedding: cos and
sin in the type of the heads, each product rounded to it, then their sum.

Shapes: T tokens, N query heads, K KV heads, H head width, R rotated
pairs (2R <= H; elements from 2R on stay).
"""

from __future__ import annotations

from torch import Tensor

from sps2_mega.kernels.paged_kv.reference import append


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
    """Rotate q and k in place by each token's angles, then write k and v to the tokens' slots.

    Args:
        q_TNH: [T, N, H].
        k_TKH, v_TKH: [T, K, H].
        k_cache, v_cache: [blocks, block_size, K, H].
        slots_T: [T] slots, block * block_size + offset.
        cos_TR, sin_TR: [T, R], in q's type.
        interleaved: whether pair r is elements 2r and 2r + 1, instead of r and R + r.
    """
    for heads in (q_TNH, k_TKH):
        rotate(heads, cos_TR, sin_TR, interleaved=interleaved)
    append(k_cache, v_cache, k_TKH, v_TKH, slots_T)


def rotate(x_TNH: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool = False) -> None:
    """Rotate the pairs of every head in place."""
    num_pairs = cos_TR.shape[1]
    if interleaved:
        first, second = x_TNH[..., 0 : 2 * num_pairs : 2], x_TNH[..., 1 : 2 * num_pairs : 2]
    else:
        first, second = x_TNH[..., :num_pairs], x_TNH[..., num_pairs : 2 * num_pairs]
    cos_T1R, sin_T1R = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    rotated = first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R
    for elements, new in zip((first, second), rotated, strict=True):
        elements.copy_(new)
