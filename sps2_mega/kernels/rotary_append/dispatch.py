"""Rotary embedding and append to the KV cache, in one launch on CUDA."""

from __future__ import annotations

from torch import Tensor

from sps2_mega.kernels.backend import Backend, choose
from sps2_mega.kernels.rotary_append import reference


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
    backend: Backend | None = None,
) -> None:
    """Rotate q and k in place and write k and v to the cache, as `reference.rotate_and_append`.

    Args:
        q_TNH: [T, N, H].
        k_TKH, v_TKH: [T, K, H].
        k_cache, v_cache: [blocks, block_size, K, H].
        slots_T: [T] slots, block * block_size + offset.
        cos_TR, sin_TR: [T, R], in q's type.
        interleaved: whether pair r is elements 2r and 2r + 1.
        backend: form to use; None lets the device decide.
    """
    form = reference.rotate_and_append
    if choose(k_cache.device, backend) is Backend.TRITON:
        from sps2_mega.kernels.rotary_append import triton

        form = triton.rotate_and_append
    form(
        q_TNH,
        k_TKH,
        v_TKH,
        k_cache,
        v_cache,
        slots_T,
        cos_TR=cos_TR,
        sin_TR=sin_TR,
        interleaved=interleaved,
    )
