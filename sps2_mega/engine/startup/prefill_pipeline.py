"""The prefill pipeline of a rank, and its trace, as the configuration asks for them."""

from __future__ import annotations

from pathlib import Path

import torch

from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.comm.comm_streams import make_comm_streams
from sps2_mega.config import EngineConfig
from sps2_mega.engine.startup.tracing import TraceFile, check_trace_path
from sps2_mega.parallel.groups import ParallelGroups


def check_pipeline(config: EngineConfig, rank: int) -> None:
    """Raises ConfigError: settings contradict each other, or this rank cannot write the trace."""
    _settings(config)
    if config.trace is not None:
        check_trace_path(Path(config.trace), rank)


def make_pipeline(
    config: EngineConfig, groups: ParallelGroups, device: torch.device
) -> tuple[Pipeline, TraceFile | None]:
    """All ranks call it together: a trace compares their clocks."""
    trace = None if config.trace is None else TraceFile(Path(config.trace), groups.control)
    pipeline = Pipeline(
        make_comm_streams(device),
        groups.sp_back,
        settings=_settings(config),
        trace=None if trace is None else trace.recorder,
    )
    return pipeline, trace


def _settings(config: EngineConfig) -> PipelineSettings:
    return PipelineSettings(mode=config.pipeline, micro_batches=config.micro_batches)
