"""Prefill attention of one layer under CSA against dense attention, and other tile shapes."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.kernel_cases.bench import HEADS, KV_HEADS, WIDTH, Bench, best_library, libraries


def csa(bench: Bench, far_degree: int) -> dict[str, Any]:
    import torch

    from sps2_mega.attention.csa.pieces import csa_pieces
    from sps2_mega.attention.layout.causal_pairs import causal_pairs
    from sps2_mega.attention.planner.sparse_volume import flops_ratio
    from sps2_mega.kernels.csa.dispatch import attend_pieces

    tokens = bench.sizes.prompt
    pattern = bench.pattern(far_degree)
    where = dict(prompt_len=tokens, kv_heads=range(KV_HEADS), layer=0)
    pieces = csa_pieces(pattern, queries=range(tokens), **where)
    q, k, v = (bench.randn(tokens, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    scale = WIDTH**-0.5
    dense = partial(
        torch.nn.functional.scaled_dot_product_attention,
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    ours = {
        f"csa {form.value}": partial(attend_pieces, q, k, v, pieces, scale=scale, backend=form)
        for form in bench.backends
    }
    times = bench.times(libraries(dense, bench.device) | ours)
    ratio = flops_ratio(pattern, **where)
    flops = 4 * WIDTH * HEADS * causal_pairs(range(tokens))
    result: dict[str, Any] = {"degrees": [1, far_degree], "flops_ratio": ratio, "seconds": times}
    result["tflops_per_s"] = {
        name: 1e-12 * flops * (ratio if name in ours else 1.0) / taken
        for name, taken in times.items()
    }
    result["share_of_ideal"] = {
        name: best_library(times) * ratio / times[name] for name in ours if name in times
    }
    if len(ours) > 1:
        outs = [work()[0] for work in ours.values()]
        result["max_difference"] = (outs[0] - outs[1]).abs().max().item()
    return result


def tile_shapes(bench: Bench) -> list[dict[str, Any]]:
    """CSA at degrees 1,4 with other tiles than the kernel's constants, to choose those from."""
    from unittest.mock import patch

    from sps2_mega.attention.csa.pieces import csa_pieces
    from sps2_mega.kernels.csa import triton as kernel
    from sps2_mega.kernels.csa.tile_shape import TileShape

    tokens = bench.sizes.prompt
    pattern = bench.pattern(4)
    where = dict(prompt_len=tokens, kv_heads=range(KV_HEADS), layer=0)
    pieces = csa_pieces(pattern, queries=range(tokens), **where)
    q, k, v = (bench.randn(tokens, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    found = []
    for rows, keys, warps, stages in bench.sizes.tiles:
        shape = TileShape(rows=rows, keys=keys, warps=warps, stages=stages)
        with patch.object(kernel, "tile_shape", lambda *_, shape=shape: shape):
            times = bench.times(
                {"csa triton": partial(kernel.attend_pieces, q, k, v, pieces, scale=WIDTH**-0.5)}
            )
        found.append(asdict(shape) | {"seconds": times})
    return found
