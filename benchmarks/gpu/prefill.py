"""Time to first token of one prompt on one rank, exact and CSA, and the share of the matrix rate.

Seconds are from the plan to the token on the host. MFU (model FLOPs utilisation) is the operations
that the pattern needs, causal pairs counted once, over seconds and the rate of a large product on
the same card.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bounds import attention_flops, linear_flops
from benchmarks.gpu.engine_rank import config_of, prompt_plan, started
from benchmarks.gpu.part import Part
from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.attention.planner.sparse_volume import flops_ratio
from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.worker.executor import Executor

_LONG = 65536  # tokens from which one round after the warm-up is enough: it takes many seconds


def run(part: Part) -> None:
    sizes = part.sizes
    longest = max(sizes.prompts)
    config = config_of(part, num_blocks=-(-longest // 16) + 1, max_model_len=longest + 1)
    with started(config) as rank:
        for tokens in sizes.prompts:
            expected = expected_s(part, rank.resolved.config, tokens)
            for degrees in [(1,), *((1, far) for far in sizes.far_degrees)]:
                what = {"case": "prefill", "tokens": tokens, "degrees": list(degrees)}
                part.case(what, partial(_timed, part, rank, tokens, degrees), seconds=expected)


def num_rounds(part: Part, tokens: int) -> int:
    """Number of prefills of a prompt; the first compiles kernels and is not counted."""
    return 1 + (part.sizes.repeats if tokens < _LONG else 1)


def expected_s(part: Part, model: ModelConfig, tokens: int) -> float:
    """Seconds allowed for all rounds of an exact prefill, at under half an H200's matrix rate."""
    flops = linear_flops(model, tokens) + attention_flops(model, tokens)
    return num_rounds(part, tokens) * flops / 350e12 if part.on_cuda else 0.0


def _timed(part: Part, rank: StartedRank, tokens: int, degrees: tuple[int, ...]) -> dict[str, Any]:
    model = rank.resolved.config
    executor, ratio = rank.executor, 1.0
    if len(degrees) > 1:
        sparse = _sparse(part, rank, tokens, degrees)
        executor = executor.with_attention("gather", sparse)
        ratio = flops_ratio(
            sparse.pattern(tokens), prompt_len=tokens, kv_heads=sparse.kv_heads, layer=0
        )
    if part.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    rounds = num_rounds(part, tokens)
    samples = [_first_token_s(executor, rank, seq_id, tokens) for seq_id in range(rounds)]
    executor.forget([rounds - 1])
    flops = linear_flops(model, tokens) + ratio * attention_flops(model, tokens)
    seconds = statistics.median(samples[1:])
    return {
        "seconds": seconds,
        "samples": samples,
        "tokens_per_s": tokens / seconds,
        "flops": flops,
        "attention_flops_ratio": ratio,
        "flops_per_s": flops / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if part.on_cuda else None,
    }


def _sparse(part: Part, rank: StartedRank, tokens: int, degrees: tuple[int, ...]) -> SparsePrefill:
    return SparsePrefill(
        csa=CSAConfig(degrees=degrees, spans=(-(-tokens // part.sizes.cells),)),
        sp_levels=rank.sp_levels,
        kv_heads=range(rank.resolved.config.num_kv_heads),
        block_size=rank.executor.pool.block_size,
    )


def _first_token_s(executor: Executor, rank: StartedRank, seq_id: int, tokens: int) -> float:
    plan = prompt_plan(rank, seq_id, tokens)
    began = time.perf_counter()
    output = executor.execute(plan)
    seconds = time.perf_counter() - began
    assert output.token_ids[0] is not None, "random weights gave no finite logits"
    return seconds
