"""Append to the KV cache in the form that suits the device: both caches in one launch on CUDA."""

from __future__ import annotations

from torch import Tensor

from sps2_mega.kernels.backend import Backend, choose
from sps2_mega.kernels.paged_kv import reference


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    slots_T: Tensor,
    *,
    backend: Backend | None = None,
) -> None:
    """Write new tokens to their slots, as `reference.append`."""
    if choose(k_cache.device, backend) is Backend.TRITON:
        from sps2_mega.kernels.paged_kv import triton

        triton.append(k_cache, v_cache, k_TKH, v_TKH, slots_T)
        return
    reference.append(k_cache, v_cache, k_TKH, v_TKH, slots_T)
