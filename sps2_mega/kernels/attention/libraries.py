"""Dense attention by the libraries that torch brings for CUDA, all with one contract: which is
taken is `choice`'s.

q [1, N, T, H], k and v [1, K, S, H], any strides with neighbouring elements of a head, 16-bit
types; causal only where T == S. Each returns out [1, N, T, H] and lse [1, N, T], float32 and
natural logarithm.
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
    """Flash attention over keys copied for each query head: what every version of torch takes."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return flash(q, k, v, scale=scale, causal=causal)


def flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention that finds the key head of a query head by itself."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )[:2]
    # Some versions pad the LSE to a multiple of their tile.
    return out, lse[..., : q.shape[2]]


def cudnn(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention: fast on new devices, and a plan to be made for every new shape."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out, lse.reshape(q.shape[:3])


LIBRARIES: dict[str, Library] = {
    "flash, keys repeated": flash_repeated,
    "flash": flash,
    "cuDNN": cudnn,
}
