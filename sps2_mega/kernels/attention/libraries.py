"""Dense attention by the CUDA libraries that torch ships, with one contract; `choice` picks one.

q [1, N, T, H], k and v [1, K, S, H], any strides as long as the elements of a head are
contiguous, 16-bit types; causal only with T == S. Each returns out [1, N, T, H] and
lse [1, N, T], float32 and natural logarithm.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Library(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]: ...


def flash_repeated(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Flash attention over keys copied for each query head, as every version of torch accepts."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return flash(q, k, v, scale=scale, causal=causal)


def flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention that maps query heads to key heads by itself."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )[:2]
    # Some versions pad the LSE to a multiple of their tile.
    return out, lse[..., : q.shape[2]]


def cudnn(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention: fast on new devices, but it makes a plan for every new shape."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out, lse.reshape(q.shape[:3])


LIBRARIES: dict[str, Library] = {
    "flash, keys repeated": flash_repeated,
    "flash": flash,
    "cuDNN": cudnn,
}
