"""Append of new keys and values to the blocks of the paged KV cache."""

from __future__ import annotations

from torch import Tensor


def append(k_cache: Tensor, v_cache: Tensor, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor) -> None:
    """Write token t to slot slots[t] = block * block_size + offset.

    Both caches are [blocks, block_size, K, H].
    """
    k_cache.flatten(0, 1).index_copy_(0, slots_T, k_TKH)
    v_cache.flatten(0, 1).index_copy_(0, slots_T, v_TKH)
