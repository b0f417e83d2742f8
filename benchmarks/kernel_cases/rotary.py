"""Rotary embedding with the write to the KV cache: one launch of our own, and what it replaces."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.kernel_cases.bench import HEADS, KV_HEADS, WIDTH, Bench

_BLOCK = 16


def rotary(bench: Bench, tokens: int, bandwidth: float) -> dict[str, Any]:
    """Seconds, and the share of the copy bandwidth.

    `torch` stands for the launches of Megatron's layers and two more for the caches. Bytes counted:
    q and k read and written in place, k once more to the cache, v read and written.
    """
    import torch

    from sps2_mega.kernels.rotary_append import dispatch

    caches = [bench.randn(-(-tokens // _BLOCK), _BLOCK, KV_HEADS, WIDTH) for _ in range(2)]
    packed = bench.randn(tokens, HEADS + 2 * KV_HEADS, WIDTH)
    q, k, v = packed.split([HEADS, KV_HEADS, KV_HEADS], 1)
    slots = torch.arange(tokens, device=bench.device)
    angles = torch.rand(tokens, WIDTH // 2, device=bench.device)
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
