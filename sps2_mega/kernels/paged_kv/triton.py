"""Append of new keys and values to the paged KV cache, both in one launch.

A program moves one token: all its heads of K and of V, from any strides of a packed projection.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_LONGEST_TILE = 4096  # elements of a token moved at a time


def append(k_cache: Tensor, v_cache: Tensor, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor) -> None:
    """Write new tokens to their slots, as `reference.append`; a negative slot skips the token.

    Raises:
        ValueError: type or shape of a token differ from the cache's.
    """
    for name, cache, new in (("keys", k_cache, k_TKH), ("values", v_cache, v_TKH)):
        if cache.dtype != new.dtype or cache.shape[2:] != new.shape[1:]:
            raise ValueError(
                f"{name}: {new.dtype} {tuple(new.shape[1:])} per token, the cache has "
                f"{cache.dtype} {tuple(cache.shape[2:])}"
            )
    if not len(k_TKH) == len(v_TKH) == len(slots_T):
        raise ValueError(f"{len(k_TKH)} keys, {len(v_TKH)} values and {len(slots_T)} slots")
    if k_TKH.numel() == 0:
        return
    elements = k_TKH.shape[1] * k_TKH.shape[2]
    _append_kernel[(len(slots_T),)](
        k_cache,
        v_cache,
        k_TKH,
        v_TKH,
        slots_T,
        slots_T.stride(0),
        k_cache.stride(0),
        *k_cache.stride()[1:],
        v_cache.stride(0),
        *v_cache.stride()[1:],
        *k_TKH.stride(),
        *v_TKH.stride(),
        BLOCK_SIZE=k_cache.shape[1],
        WIDTH=k_TKH.shape[2],
        ELEMENTS=elements,
        TILE=min(_LONGEST_TILE, triton.next_power_of_2(elements)),
    )


@triton.jit
def _append_kernel(
    k_cache,
    v_cache,
    k,
    v,
    slots,
    slots_stride,
    k_cache_stride_block,
    k_cache_stride_slot,
    k_cache_stride_k,
    k_cache_stride_h,
    v_cache_stride_block,
    v_cache_stride_slot,
    v_cache_stride_k,
    v_cache_stride_h,
    k_stride_t,
    k_stride_k,
    k_stride_h,
    v_stride_t,
    v_stride_k,
    v_stride_h,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ELEMENTS: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_stride).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k_to = k_cache + block * k_cache_stride_block + offset * k_cache_stride_slot
    v_to = v_cache + block * v_cache_stride_block + offset * v_cache_stride_slot
    for begin in range(0, ELEMENTS, TILE):
        element = begin + tl.arange(0, TILE)
        inside = (element < ELEMENTS) & (slot >= 0)
        head, h = element // WIDTH, element % WIDTH
        new_k = tl.load(k + token * k_stride_t + head * k_stride_k + h * k_stride_h, mask=inside)
        new_v = tl.load(v + token * v_stride_t + head * v_stride_k + h * v_stride_h, mask=inside)
        tl.store(k_to + head * k_cache_stride_k + h * k_cache_stride_h, new_k, mask=inside)
        tl.store(v_to + head * v_cache_stride_k + h * v_cache_stride_h, new_v, mask=inside)
