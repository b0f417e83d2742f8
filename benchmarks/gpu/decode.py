"""Decode steps of the runtime on one rank: tokens per second, and the share of the bandwidth bound.

A step is timed as a caller sees it, from the plan to the tokens on the host. Its bound is every
weight and every key and value of the batch read once at the rate of a large copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import device_time
from benchmarks.gpu.bounds import decode_bytes, spread
from benchmarks.gpu.engine_rank import (
    RunningSequences,
    config_of,
    fill_cache,
    num_blocks,
    started,
)
from benchmarks.gpu.part import Part
from sps2_mega.checkpoint.canonical import num_parameters
from sps2_mega.checkpoint.resolve import resolve_model
from sps2_mega.config import ModelConfig
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.worker.executor import Executor

_BLOCK = 16
_WARM_UP = 5


def run(part: Part) -> None:
    sizes = part.sizes
    model = resolve_model(sizes.model, needs_weights=False).config
    steps = sizes.decode_steps + _WARM_UP
    shapes = [[context] * batch for batch, context in sizes.decode] + [spread(*sizes.mixed)]
    wanted = max(num_blocks(contexts, steps, _BLOCK) for contexts in shapes)
    blocks = min(wanted, _room(part, model))
    longest = max(map(max, shapes)) + steps
    config = config_of(part, num_blocks=blocks, max_model_len=longest, graphs=True)
    with started(config) as rank:
        executors = {False: rank.executor.with_attention(rank.transport, None)}
        if part.on_cuda:
            executors[True] = rank.executor
        fill_cache(rank, model.num_layers)
        bandwidth = device_time.copy_bandwidth(part.device, sizes.copied_bytes, sizes.repeats)
        for contexts in shapes:
            fitting = _shortened(contexts, steps, blocks)
            mixed = len(set(fitting)) > 1
            what: dict[str, Any] = {
                "case": "decode mixed" if mixed else "decode",
                "batch": len(fitting),
                "context": [min(fitting), max(fitting)] if mixed else fitting[0],
                "tokens": sum(fitting),
            }
            for graphs, executor in executors.items():
                work = partial(_timed, part, rank, executor, fitting, bandwidth)
                part.case(what | {"graphs": graphs}, work, seconds=5.0 if part.on_cuda else 0.0)


def _timed(
    part: Part,
    rank: StartedRank,
    executor: Executor,
    contexts: Sequence[int],
    bandwidth: float,
) -> dict[str, Any]:
    running = RunningSequences(rank, executor, contexts)
    try:
        samples = []
        for _ in range(part.sizes.decode_steps + _WARM_UP):
            began = time.perf_counter()
            running.step()
            samples.append(time.perf_counter() - began)
        on_device = _device_s(part, running)
    finally:
        running.leave()
    seconds = statistics.median(samples[_WARM_UP:])
    bound = decode_bytes(rank.resolved.config, contexts, part.dtype.itemsize) / bandwidth
    return {
        "seconds": seconds,
        "worst_seconds": max(samples[_WARM_UP:]),
        "tokens_per_s": len(contexts) / seconds,
        "bound_seconds": bound,
        "share_of_bound": bound / seconds,
        "kernel_seconds": on_device,
        "kernel_share_of_bound": None if on_device is None else bound / on_device,
    }


def _device_s(part: Part, running: RunningSequences) -> float | None:
    """Seconds in the kernels of one step, without the gaps between them; None without a GPU."""
    if not part.on_cuda:
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        running.step()
    return sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6


def _room(part: Part, model: ModelConfig) -> int:
    """Blocks that fit the device beside the weights; without a GPU tiny sizes always fit."""
    if not part.on_cuda:
        return 1 << 20
    free = torch.cuda.mem_get_info()[0] - part.sizes.kv_reserve_bytes
    free -= num_parameters(model) * part.dtype.itemsize
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * part.dtype.itemsize
    return int(free // (token * _BLOCK))


def _shortened(contexts: Sequence[int], steps: int, blocks: int) -> list[int]:
    """The contexts, or equal shares of the blocks if there is no room for them."""
    if num_blocks(contexts, steps, _BLOCK) <= blocks:
        return list(contexts)
    each = blocks // len(contexts) * _BLOCK - steps
    return [min(context, each) for context in contexts]
