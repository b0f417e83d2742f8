"""Prefill attention of a rank as the configuration asks for it: pipeline, trace and planner."""

from __future__ import annotations

from pathlib import Path

import torch

from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.attention.planner.exact import TRANSPORTS
from sps2_mega.attention.planner.step_planner import PrefillPlanner
from sps2_mega.checkpoint.sharding import num_query_groups
from sps2_mega.comm.comm_streams import make_comm_streams
from sps2_mega.config import EngineConfig, ModelConfig
from sps2_mega.engine.startup.machine_probe import machine_facts
from sps2_mega.engine.startup.tracing import TraceFile, check_trace_path
from sps2_mega.engine.startup.transport_probe import LayerHeads
from sps2_mega.mcore.init import Compute
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.launcher import LaunchInfo, cache_folder


def check_pipeline(config: EngineConfig, rank: int) -> None:
    """Refuse settings that contradict each other, and a trace that this rank cannot write.

    Raises:
        ConfigError: with the name of the setting.
    """
    _settings(config)
    if config.trace is not None:
        check_trace_path(Path(config.trace), rank)


def make_pipeline(
    config: EngineConfig, groups: ParallelGroups, device: torch.device
) -> tuple[Pipeline, TraceFile | None]:
    """Prefill pipeline and its trace. All ranks call it together: a trace compares their clocks."""
    trace = None if config.trace is None else TraceFile(Path(config.trace), groups.control)
    pipeline = Pipeline(
        make_comm_streams(device),
        groups.sp_back,
        settings=_settings(config),
        trace=None if trace is None else trace.recorder,
    )
    return pipeline, trace


def make_planner(
    config: EngineConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    compute: Compute,
    info: LaunchInfo,
) -> PrefillPlanner:
    """Planner of each step's transports; all ranks call it together, as it may measure links."""
    tp = groups.tp.size
    heads = LayerHeads(
        num_heads=model.num_heads // tp,
        num_kv_heads=num_query_groups(model, tp) // tp,
        head_dim=model.head_dim,
        dtype=compute.dtype,
    )
    machine = machine_facts(
        groups,
        heads,
        device=compute.device,
        network=info.master_addr,
        folder=cache_folder(),
    )
    return PrefillPlanner(
        machine=machine,
        candidates=TRANSPORTS,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        itemsize=heads.dtype.itemsize,
        window=model.sliding_window,
        overlap=config.pipeline != "off",
        log_choices=groups.global_rank == 0,
    )


def _settings(config: EngineConfig) -> PipelineSettings:
    return PipelineSettings(mode=config.pipeline, micro_batches=config.micro_batches)
