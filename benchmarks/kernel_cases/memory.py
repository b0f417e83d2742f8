"""Kernels bound by memory: merging partials and appending to the paged cache."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.kernel_cases.bench import HEADS, KV_HEADS, WIDTH, Bench


def merge(bench: Bench, partials: int, bandwidth: float) -> dict[str, Any]:
    import torch

    from sps2_mega.kernels.lse import dispatch

    tokens = bench.sizes.merged_tokens
    out = bench.randn(partials, tokens, HEADS, WIDTH)
    lse = torch.randn(partials, tokens, HEADS, device=bench.device)
    times = bench.times(
        {
            f"merge {form.value}": partial(dispatch.merge, out, lse, backend=form)
            for form in bench.backends
        }
    )
    moved = (out.numel() * bench.dtype.itemsize + lse.numel() * 4) * (1 + 1 / partials)
    shares = {name: moved / taken / bandwidth for name, taken in times.items()}
    return {"partials": partials, "seconds": times, "share_of_copy": shares}


def append(bench: Bench, bandwidth: float) -> dict[str, Any]:
    import torch

    from sps2_mega.kernels.paged_kv import dispatch

    tokens, block_size = bench.sizes.merged_tokens, 16
    num_blocks = -(-tokens // block_size)
    k_cache, v_cache = (bench.randn(num_blocks, block_size, KV_HEADS, WIDTH) for _ in range(2))
    packed = bench.randn(tokens, HEADS + 2 * KV_HEADS, WIDTH)
    _, k, v = packed.split([HEADS, KV_HEADS, KV_HEADS], 1)
    slots = torch.arange(tokens, device=bench.device)
    times = bench.times(
        {
            f"append {form.value}": partial(
                dispatch.append, k_cache, v_cache, k, v, slots, backend=form
            )
            for form in bench.backends
        }
    )
    moved = 4 * k.numel() * bench.dtype.itemsize
    shares = {name: moved / taken / bandwidth for name, taken in times.items()}
    return {"tokens": tokens, "seconds": times, "share_of_copy": shares}
