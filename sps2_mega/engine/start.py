"""The engine of this rank, whatever its part in the job: one that takes requests on rank 0, a
worker elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Callable

from sps2_mega.config import EngineConfig
from sps2_mega.engine.disaggregated.decode_driver import DecodeDriver
from sps2_mega.engine.disaggregated.decode_rank import DecodeRank
from sps2_mega.engine.disaggregated.engine import DisaggregatedEngine
from sps2_mega.engine.disaggregated.prefill_rank import PrefillRank
from sps2_mega.engine.engine import Engine
from sps2_mega.engine.startup.start_rank import StartedRank, start_rank
from sps2_mega.parallel.launcher import LaunchInfo

Driver = Engine | DisaggregatedEngine
Worker = Engine | PrefillRank | DecodeDriver | DecodeRank


def start_driver(
    config: EngineConfig,
    info: LaunchInfo,
    *,
    show_progress: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Driver:
    """To be called on rank 0 while all other ranks call `run_worker`; `on_stage` hears what the
    start is at.

    Raises:
        ConfigError, CheckpointError: the configuration or the checkpoint cannot work.
    """
    assert info.rank == 0, f"rank {info.rank} does not take requests"
    return driver_of(start_rank(config, info, show_progress=show_progress, on_stage=on_stage))


def driver_of(rank: StartedRank) -> Driver:
    """The engine that takes requests, on rank 0."""
    return Engine(rank) if rank.bridge is None else DisaggregatedEngine(rank)


def run_worker(config: EngineConfig, info: LaunchInfo) -> None:
    """Joins the job as any rank but the first, and follows its driver to the end.

    Raises:
        ConfigError, CheckpointError: the configuration or the checkpoint cannot work.
    """
    rank = start_rank(config, info, show_progress=False)
    worker: Worker
    if rank.bridge is None:
        worker = Engine(rank)
    elif rank.side.name == "prefill":
        worker = PrefillRank(rank)
    else:
        worker = DecodeDriver(rank) if info.rank == rank.side.first else DecodeRank(rank)
    settle()
    worker.run_worker()


def settle() -> None:
    """Takes what exists now out of garbage collection, in a process that only serves from here on.

    There are some 300,000 objects, mostly of imported libraries, and looking through them stops a
    step for 0.1 s.
    """
    gc.collect()
    gc.freeze()
