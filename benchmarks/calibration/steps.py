"""Decode steps of an engine on a small probe, to time what reading the weights does not explain.

The rest of a step is launching, planning, telling the ranks, sampling and small exchanges, timed
where they occur. There are two probes. The bundled model's layers stay in a CPU's caches from one
step to the next, as do those of models as small. Layers of larger models evict everything else,
also what the host and the network stack need next, which then take several times as long: the other
probe has layers of that size.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sps2_mega.checkpoint.huggingface.config import model_config_from_hf
from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.config import ModelConfig
from sps2_mega.engine.start import driver_of, worker_of
from sps2_mega.engine.startup.start_rank import StartedRank, start_rank
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.serving.llm import engine_config
from sps2_mega.simulator.model_size import model_size
from sps2_mega.types import SamplingParams

BUNDLED = "sps2-tiny"
_STEPS = 200
_CACHED_BYTES = 32 * 2**20  # weights of a layer, more than any cache holds
_LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Model of the timed steps; `source` is a bundled name, or None for a random `config`."""

    source: str | None
    config: ModelConfig


def probe_for(model: ModelConfig, dtype: str) -> Probe:
    """The probe that stands for `model`, both in `dtype`."""
    source, config = BUNDLED, named_model_file(BUNDLED).config
    if model_size(dataclasses.replace(model, dtype=dtype)).layer_bytes > _CACHED_BYTES:
        source, config = None, model_config_from_hf(_LARGE)
    return Probe(source=source, config=dataclasses.replace(config, dtype=dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSteps:
    """Median seconds of a step, of one of its layers, and of the rest.

    The rest is planning, telling the ranks, sampling and committing.
    """

    step_s: float
    layer_s: float
    host_s: float


def start_on_probe(
    probe: Probe, info: LaunchInfo, *, tp: int, device: str, dtype: str
) -> StartedRank:
    """Start an engine on the probe: TP groups of `tp` ranks, SP over the rest (collective)."""
    on_cuda = device != "cpu" and torch.cuda.is_available()
    options = {
        "num_blocks": 64,
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads() if on_cuda else 1,
    }
    degrees = {"tp": tp, "sp": info.world_size // tp}
    if probe.source is not None:
        config = engine_config(probe.source, **degrees, options=options)
        return start_rank(config, info, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_LARGE))
        config = engine_config(folder, **degrees, options={**options, "load_format": "dummy"})
        return start_rank(config, info, show_progress=False)


def decode_steps(rank: StartedRank) -> DecodeSteps | None:
    """Time decode steps of a short sequence; None on follower ranks, which leave the job here."""
    if rank.groups.global_rank > 0:
        worker_of(rank).run()
        return None
    engine = driver_of(rank)
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
    return DecodeSteps(step_s=step_s, layer_s=layer_s, host_s=step_s - layers_s)


def tp_step_s(probe: Probe, info: LaunchInfo, *, device: str, dtype: str) -> float | None:
    """Median seconds of a decode step with TP over all ranks of the job; None on all but rank 0.

    Raises:
        ConfigError: the probe's KV heads cannot be dealt to so many ranks.
    """
    started = start_on_probe(probe, info, tp=info.world_size, device=device, dtype=dtype)
    steps = decode_steps(started)
    return None if steps is None else steps.step_s
