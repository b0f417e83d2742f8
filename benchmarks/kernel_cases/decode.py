"""Paged decode attention of one layer against dense attention on contiguous keys."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from benchmarks.kernel_cases.bench import HEADS, KV_HEADS, WIDTH, Bench, libraries


def decode(bench: Bench, batch: int, context: int, bandwidth: float) -> dict[str, Any] | None:
    """Seconds of one layer's decode attention; None if the device has no room."""
    import numpy as np
    import torch

    from benchmarks.gpu.device_time import in_graph
    from sps2_mega.kernels.paged_decode import dispatch

    block_size, scale = 16, WIDTH**-0.5
    per_row = -(-context // block_size)
    num_bytes = 2 * batch * context * KV_HEADS * WIDTH * bench.dtype.itemsize
    copies = max(1, bench.sizes.rotated_bytes // num_bytes)
    if bench.device.type == "cuda" and 2.5 * copies * num_bytes > torch.cuda.mem_get_info()[0]:
        return None
    num_blocks = copies * batch * per_row
    k_cache, v_cache = (bench.randn(num_blocks, block_size, KV_HEADS, WIDTH) for _ in range(2))
    tables = np.random.default_rng(0).permutation(num_blocks).reshape(copies, batch, per_row)
    q = bench.randn(batch, HEADS, WIDTH)
    contestants = {}
    for form in bench.backends:
        rows = [
            dispatch.prepare(
                table,
                np.zeros(batch, dtype=np.int64),
                np.full(batch, context),
                block_size=block_size,
                dtype=bench.dtype,
                device=bench.device,
                backend=form,
            )
            for table in tables
        ]
        works = [partial(dispatch.paged_decode, q, k_cache, v_cache, r, scale=scale) for r in rows]
        contestants[f"paged {form.value}"] = works
    dense_k, dense_v = (
        x.view(-1)[: copies * batch * context * KV_HEADS * WIDTH]
        .view(copies, batch, KV_HEADS, context, WIDTH)
        for x in (k_cache, v_cache)
    )  # fmt: skip
    for name, _ in libraries(lambda: None, bench.device).items():
        contestants[name] = [
            libraries(
                partial(
                    torch.nn.functional.scaled_dot_product_attention,
                    q.unsqueeze(2),
                    dense_k[copy],
                    dense_v[copy],
                    scale=scale,
                    enable_gqa=True,
                ),
                bench.device,
            )[name]
            for copy in range(copies)
        ]
    ready = {}
    for name, works in contestants.items():
        try:
            ready[name] = in_graph(works, bench.device)
        except RuntimeError as error:
            print(f"  {name} left out: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    times = {name: taken / copies for name, taken in bench.times(ready).items()}
    return {
        "batch": batch,
        "context": context,
        "seconds": times,
        "share_of_copy": {name: num_bytes / taken / bandwidth for name, taken in times.items()},
    }
