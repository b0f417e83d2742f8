"""Rotary embedding with the write to the KV cache: one launch of our own, and what it replaces."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.kernels import Bench

_BLOCK = 16


def rotary(
    bench: Bench, heads: tuple[int, int, int], tokens: int, bandwidth: float
) -> dict[str, Any]:
    """`heads` are (query heads, KV heads, width). `torch` is what Megatron's layers do in launches
    of their own, then two for the caches. Bytes: q and k read and written in place, k once more to
    the cache, v read and written."""
    import torch

    from sps2_mega.kernels.rotary_append import dispatch

    num_heads, kv_heads, width = heads
    caches = [bench.randn(-(-tokens // _BLOCK), _BLOCK, kv_heads, width) for _ in range(2)]
    packed = bench.randn(tokens, num_heads + 2 * kv_heads, width)
    q, k, v = packed.split([num_heads, kv_heads, kv_heads], 1)
    slots = torch.arange(tokens, device=bench.device)
    angles = torch.rand(tokens, width // 2, device=bench.device)
    rotation = {"cos_TR": angles.cos().to(bench.dtype), "sin_TR": angles.sin().to(bench.dtype)}
    times = bench.times(
        {
            f"rotate and append {form.value}": partial(
                dispatch.rotate_and_append, q, k, v, *caches, slots, **rotation, backend=form
            )
            for form in bench.backends
        }
    )
    moved = (2 * q.numel() + 3 * k.numel() + 2 * v.numel()) * bench.dtype.itemsize
    shares = {name: moved / taken / bandwidth for name, taken in times.items()}
    return {"tokens": tokens, "seconds": times, "share_of_copy": shares}
