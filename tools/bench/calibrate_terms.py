"""The simulator's terms of one machine, measured by all ranks of a job at once; the slowest rank counts.

    peak        the largest product that is timed               linear     a layer of the model without attention
    attention   causal, one long prompt                         memory     a matrix read for one vector, as decode does
    layer       one of a decode step, less what is below         links      `calibrate_links`, per SP level
    step        of a decode step what is not the layers         small      calls, merges, copies: `engine.machine_probe`
    cache       decode attention of one query, all its tokens in scattered blocks

Layers are Megatron's own with random weights, so what is between its products is counted where it occurs; decode steps are
the engine's, with the bundled model. Means and medians, not
best times: where ranks share cores, waiting for one is part of the price. Decides no units of the file
(`calibrate_file`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sps2_mega.config import ModelConfig
from sps2_mega.engine.engine import Engine
from sps2_mega.engine.machine_probe import attention_speed
from sps2_mega.engine.startup import StartedRank, start_rank
from sps2_mega.kernels.attention.sdpa import attend_run
from sps2_mega.kernels.paged_decode.dispatch import paged_decode, prepare
from sps2_mega.mcore.gpt import GPT
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.serving.llm import engine_config
from sps2_mega.simulator.compute import causal_pairs
from sps2_mega.simulator.model_size import model_size
from sps2_mega.types import SamplingParams
from tools.bench.calibrate_links import MeasuredLink, measured_links
from tools.bench.calibrate_timer import PEAK_WIDTH, Timer

_LAYERS = 2  # of the timed model: more would measure the same again
_READ_BYTES = {"cpu": 64 * 2**20, "cuda": 2 * 2**30}
_BLOCK = 16
_STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Rates per rank while all ranks work; `memory_bytes` is what one rank may have. `links` and `levels` are those of the
    SP levels, empty for one rank."""

    device: str
    ranks: int
    ranks_per_node: int
    tokens: int
    peak_flops_per_s: float
    linear_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes: float
    read_bytes_per_s: float
    layer_overhead_s: float
    step_overhead_s: float
    kv_bytes_per_s: float
    call_s: float
    merge_s: float
    copy_s: float
    levels: tuple[int, ...]
    links: tuple[MeasuredLink, ...]


def measure(
    model: ModelConfig, info: LaunchInfo, *, tokens: int | None, device: str, dtype: str
) -> Terms | None:
    """All ranks call it together; None on all but rank 0. `tokens` None: 4096 on CPU, 8192 on CUDA.

    Raises:
        ConfigError: ranks cannot meet, or CUDA is asked for and is not there.
    """
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if dtype == "auto":
        dtype = model.dtype if on_cuda else "float32"
    # An engine on the bundled model joins the ranks, and its steps show what the host needs.
    config = engine_config(
        "sps2-tiny",
        tp=1,
        sp=info.world_size,
        options={
            "num_blocks": 64,
            "device": device,
            "dtype": dtype,
            "threads": torch.get_num_threads() if on_cuda else 1,
        },
    )
    rank = start_rank(config, info, show_progress=False)
    engine, timer = Engine(rank), Timer(rank)
    if tokens is None:
        tokens = 4096 if timer.on_cpu else 8192
    groups = [group for group in rank.groups.sp_levels if group.size > 1]
    links = measured_links(groups, timer)
    gpt = _random_gpt(model, rank)
    size = model_size(model)
    one_s, all_s = _layer_s(gpt, 1, timer), _layer_s(gpt, tokens, timer)
    small = attention_speed(model.head_dim, timer.dtype, timer.device, rank.groups.control)
    read_s = timer.agreed(_read_once(timer))
    read_rate = _READ_BYTES[timer.device.type] / read_s
    flops = 2.0 * tokens * size.layer_params
    linear = flops / max(all_s - one_s, all_s / 10)
    attention = _attention_rate(model, tokens, timer)
    kv_rate = _kv_rate(model, tokens, timer)
    steps = _decode_steps(engine)
    if steps is None:
        return None
    weights_s = size.layer_params * timer.itemsize / read_rate
    own = model_size(rank.resolved.config)
    # Queries go out and partials come home in each layer; the rest of it that is not reading is overhead.
    exchanges_s = 2 * max((link.latency_s for link in links), default=0.0)
    overhead_s = steps.layer_s - own.layer_params * timer.itemsize / read_rate - exchanges_s
    width = PEAK_WIDTH[timer.device.type]
    return Terms(
        device=_device_name(timer.device),
        ranks=info.world_size,
        ranks_per_node=info.local_world_size,
        tokens=tokens,
        peak_flops_per_s=max(2.0 * width**3 / timer.peak_s, linear, attention),
        linear_flops_per_s=linear,
        attention_flops_per_s=attention,
        memory_bytes=_memory_bytes(timer.device, info),
        read_bytes_per_s=read_rate,
        layer_overhead_s=max(overhead_s, one_s - weights_s, one_s / 10),
        step_overhead_s=steps.host_s,
        kv_bytes_per_s=kv_rate,
        call_s=small["call_s"],
        merge_s=small["merge_s"],
        copy_s=small["copy_s"],
        levels=tuple(group.size for group in groups),
        links=links,
    )


class _NoAttention:
    """Stands where attention would: what is left of the layer is timed."""

    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k: Tensor,
        v: Tensor,
        rule: object,
        rotation: object = None,
    ) -> Tensor:
        return q_TNH


def _random_gpt(model: ModelConfig, rank: StartedRank) -> GPT:
    """Few layers of that width and a small vocabulary, with weights that keep numbers finite."""
    short = dataclasses.replace(model, num_layers=_LAYERS, vocab_size=64, sliding_window=None)
    gpt = GPT(short, rank.groups, dtype=rank.compute.dtype, device=rank.compute.device)
    with torch.inference_mode():
        for weight in gpt.weights().values():
            torch.nn.init.normal_(weight, std=0.02)
    return gpt


def _layer_s(gpt: GPT, tokens: int, timer: Timer) -> float:
    """One layer of `tokens` tokens, without attention, the embedding and the head."""
    ids = torch.zeros(tokens, dtype=torch.int64, device=timer.device)
    start = gpt.begin(ids, ids, _NoAttention())

    def layers() -> None:
        run = dataclasses.replace(start)
        gpt.advance(run, _LAYERS)

    return timer.agreed(layers) / _LAYERS


def _attention_rate(model: ModelConfig, tokens: int, timer: Timer) -> float:
    def made(heads: int) -> Tensor:
        return torch.zeros(tokens, heads, model.head_dim, dtype=timer.dtype, device=timer.device)

    q, k, v = made(model.num_heads), made(model.num_kv_heads), made(model.num_kv_heads)
    seconds = timer.agreed(lambda: attend_run(q, k, v, scale=1.0, q_start=0))
    return 4.0 * model.head_dim * model.num_heads * causal_pairs(0, tokens) / seconds


def _kv_rate(model: ModelConfig, tokens: int, timer: Timer) -> float:
    """Bytes of keys and values that decode attention of one query reads per second, from a cache whose blocks lie in any
    order."""
    blocks = -(-tokens // _BLOCK)
    shape = (blocks, _BLOCK, model.num_kv_heads, model.head_dim)
    k_cache, v_cache = torch.zeros(2, *shape, dtype=timer.dtype, device=timer.device)
    q = torch.zeros(1, model.num_heads, model.head_dim, dtype=timer.dtype, device=timer.device)
    table = np.random.default_rng(0).permutation(blocks).astype(np.int32)[None]

    def seconds(end: int) -> float:
        rows = prepare(
            table,
            np.array([0]),
            np.array([end]),
            block_size=_BLOCK,
            dtype=timer.dtype,
            device=timer.device,
        )
        return timer.agreed(lambda: paged_decode(q, k_cache, v_cache, rows, scale=1.0))

    whole_s, least_s = seconds(tokens), seconds(1)
    return 2 * k_cache.nbytes / max(whole_s - least_s, whole_s / 10)


def _read_once(timer: Timer) -> Callable[[], object]:
    columns = 4096
    rows = _READ_BYTES[timer.device.type] // timer.itemsize // columns
    matrix = torch.ones(rows, columns, dtype=timer.dtype, device=timer.device)
    vector = torch.ones(columns, dtype=timer.dtype, device=timer.device)
    return lambda: matrix @ vector


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodeSteps:
    """Median seconds of a layer, and of what is not layers: planning, telling the ranks, sampling, committing."""

    layer_s: float
    host_s: float


def _decode_steps(engine: Engine) -> _DecodeSteps | None:
    """Of a short sequence. None on ranks that follow, which leave the job here."""
    if not engine.is_driver:
        engine.run_worker()
        return None
    advance = engine.model.advance
    inside: list[float] = []

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        advance(*arguments)
        inside.append(time.perf_counter() - began)

    engine.model.advance = timed  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=_STEPS, temperature=0.0, ignore_eos=True)
    engine.add_request("steps", [1, 2, 3], params)
    engine.step()
    inside.clear()
    whole = []
    while engine.has_work():
        began = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - began)
    engine.shutdown()
    layers_s, step_s = median(inside), median(whole)
    layer_s = layers_s / engine.model_config.num_layers
    return _DecodeSteps(layer_s=layer_s, host_s=step_s - layers_s)


def _memory_bytes(device: torch.device, info: LaunchInfo) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return psutil.virtual_memory().total / info.local_world_size


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from tools.bench.machine import describe

    facts = describe()
    return f"{facts['cpu']}, {torch.get_num_threads()} of {facts['cores']} cores per rank"
