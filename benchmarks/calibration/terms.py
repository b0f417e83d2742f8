"""The simulator's terms of one machine, measured by all ranks at once; the slowest rank counts.

    peak        the largest product that is timed
    linear      a layer of the model without attention
    attention   causal, one long prompt
    memory      weights of a layer for one token, as decode reads them
    cache       decode attention of one query, all its tokens in scattered blocks
    layer       a layer of a decode step, less reading and sending
    step        a decode step less its layers
    links       `calibration.links`, per SP level
    small       calls, merges, copies: the engine's machine probe

Layers are Megatron's own with random weights, so what happens between their products is counted
where it occurs; decode steps are the engine's (`calibration.steps`). Figures are means and medians,
not best times: where ranks share cores, waiting for a core is part of the price. The file's units
are decided in `calibration.file`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.calibration.links import MeasuredLink, measured_links, middle_links
from benchmarks.calibration.steps import BUNDLED, decode_steps, probe_for, start_on_probe
from benchmarks.calibration.timer import PEAK_WIDTH, Timer
from sps2_mega.attention.layout.causal_pairs import causal_pairs
from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.config import ModelConfig
from sps2_mega.engine.startup.machine_probe import attention_speed
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.kernels.attention.sdpa import attend_run
from sps2_mega.kernels.paged_decode.dispatch import paged_decode, prepare
from sps2_mega.mcore.gpt import GPT
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.simulator.model_size import model_size

_LAYERS = 2  # of the timed model: more would measure the same again
_READ_BYTES = {"cpu": 64 * 2**20, "cuda": 2 * 2**30}
_MOSTLY_READING = 4.0  # relative to a layer that reads next to nothing
_BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Rates per rank while all ranks work.

    `memory_bytes` is what one rank may have. `links` and `levels` belong to the SP levels and are
    empty for one rank.
    """

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


def terms_of(values: Mapping[str, Any]) -> Terms:
    """Inverse of `dataclasses.asdict`, also after a round trip through JSON."""
    links = tuple(MeasuredLink(**link) for link in values["links"])
    return Terms(**{**values, "levels": tuple(values["levels"]), "links": links})


def measure(
    model: ModelConfig, info: LaunchInfo, *, tokens: int | None, device: str, dtype: str
) -> Terms | None:
    """Measure all terms (collective); None on all ranks but rank 0.

    `tokens` None means 4096 on CPU and 8192 on CUDA.

    Raises:
        ConfigError: ranks cannot meet, or CUDA is asked for and is not there.
    """
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if dtype == "auto":
        dtype = model.dtype if on_cuda else "float32"
    size = model_size(dataclasses.replace(model, dtype=dtype))
    probe = probe_for(model, dtype)
    # Its engine joins the ranks, and its steps show what the host needs.
    rank = start_on_probe(probe, info, tp=1, device=device, dtype=dtype)
    timer = Timer(rank)
    if tokens is None:
        tokens = 4096 if timer.on_cpu else 8192
    groups = [group for group in rank.groups.sp_levels if group.size > 1]
    looks = [measured_links(groups, timer)]
    gpt = _random_gpt(model, rank)
    one_s, all_s = _layer_s(gpt, 1, timer), _layer_s(gpt, tokens, timer)
    small = attention_speed(model.head_dim, timer.dtype, timer.device, rank.groups.control)
    read_rate = _read_rate(size.layer_bytes, one_s, rank, timer)
    looks.append(measured_links(groups, timer))
    flops = 2.0 * tokens * size.layer_params
    linear = flops / max(all_s - one_s, all_s / 10)
    attention = _attention_rate(model, tokens, timer)
    kv_rate = _kv_rate(model, tokens, timer)
    looks.append(measured_links(groups, timer))
    links = middle_links(looks)
    steps = decode_steps(rank)
    if steps is None:
        return None
    weights_s = size.layer_bytes / read_rate
    # Queries go out and partials return in each layer; what else is not reading is
    # overhead.
    exchanges_s = 2 * max((link.latency_s for link in links), default=0.0)
    reads_s = model_size(probe.config).layer_bytes / read_rate
    overhead_s = steps.layer_s - reads_s - small["call_s"] - exchanges_s
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
    """Stand-in for attention, so that the rest of the layer is timed."""

    def run_layer(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        softmax: object,
        rotation: object = None,
    ) -> Tensor:
        return q_TNH


def _random_gpt(model: ModelConfig, rank: StartedRank) -> GPT:
    """Model of a few layers of that width, a small vocabulary, and weights that stay finite."""
    short = dataclasses.replace(model, num_layers=_LAYERS, vocab_size=64, sliding_window=None)
    gpt = GPT(short, rank.groups, dtype=rank.compute.dtype, device=rank.compute.device)
    with torch.inference_mode():
        for weight in gpt.weights().values():
            torch.nn.init.normal_(weight, std=0.02)
    gpt.pack()  # as the engine does
    return gpt


def _layer_s(gpt: GPT, tokens: int, timer: Timer) -> float:
    """Seconds of one layer of `tokens` tokens, without attention, embedding and head."""
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
    return 4.0 * model.head_dim * model.num_heads * causal_pairs(range(tokens)) / seconds


def _kv_rate(model: ModelConfig, tokens: int, timer: Timer) -> float:
    """Bytes of K and V per second that decode attention of one query reads, blocks in any order."""
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


def _read_rate(layer_bytes: float, one_s: float, rank: StartedRank, timer: Timer) -> float:
    """Bytes of weights per second that a decode step reads.

    The model's own layer for one token is timed if reading is most of its time, else a matrix that
    no cache holds.
    """
    narrow = named_model_file(BUNDLED).config
    narrow_s = _layer_s(_random_gpt(narrow, rank), 1, timer)
    if one_s > _MOSTLY_READING * narrow_s:
        narrow_bytes = model_size(narrow).layer_params * timer.itemsize
        return (layer_bytes - narrow_bytes) / (one_s - narrow_s)
    return _READ_BYTES[timer.device.type] / timer.agreed(_read_once(timer))


def _read_once(timer: Timer) -> Callable[[], object]:
    columns = 4096
    rows = _READ_BYTES[timer.device.type] // timer.itemsize // columns
    matrix = torch.ones(rows, columns, dtype=timer.dtype, device=timer.device)
    vector = torch.ones(columns, dtype=timer.dtype, device=timer.device)
    return lambda: matrix @ vector


def _memory_bytes(device: torch.device, info: LaunchInfo) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return psutil.virtual_memory().total / info.local_world_size


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from benchmarks.machine import describe

    facts = describe()
    return f"{facts['cpu']}, {torch.get_num_threads()} of {facts['cores']} cores per rank"
