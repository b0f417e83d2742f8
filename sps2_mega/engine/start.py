"""Construct a rank's part in the job: the engine that takes requests, or a worker.

                 without decode ranks   with decode ranks
rank 0           Engine                 DisaggregatedEngine
other ranks      Follower               PrefillRank; DecodeDriver and DecodeRank
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sps2_mega.config import EngineConfig
from sps2_mega.engine.disaggregated.decode_driver import DecodeDriver
from sps2_mega.engine.disaggregated.decode_rank import DecodeRank
from sps2_mega.engine.disaggregated.engine import DisaggregatedEngine
from sps2_mega.engine.disaggregated.prefill_rank import PrefillRank
from sps2_mega.engine.engine import Engine
from sps2_mega.engine.follower import Follower
from sps2_mega.engine.startup.scheduler_setup import make_scheduler
from sps2_mega.engine.startup.start_rank import StartedRank, start_rank
from sps2_mega.garbage_collection import settle
from sps2_mega.parallel.launcher import LaunchInfo

Driver = Engine | DisaggregatedEngine


class Worker(Protocol):
    """A rank that takes no requests."""

    def run(self) -> None:
        """Do this rank's part of every step, until the driver ends the job."""


def start_driver(
    config: EngineConfig,
    info: LaunchInfo,
    *,
    show_progress: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Driver:
    """Start rank 0, while all other ranks call `run_worker`. `on_stage` is called with the name of
    each stage of the start.

    Raises:
        ConfigError, CheckpointError: the configuration or the checkpoint cannot work.
    """
    assert info.rank == 0, f"rank {info.rank} does not take requests"
    return driver_of(start_rank(config, info, show_progress=show_progress, on_stage=on_stage))


def driver_of(rank: StartedRank) -> Driver:
    """Engine of a started rank 0."""
    if rank.bridge is None:
        return Engine(rank, make_scheduler(rank), rank.tokenizer)
    return DisaggregatedEngine(rank, rank.tokenizer)


def run_worker(config: EngineConfig, info: LaunchInfo) -> None:
    """Join the job as any rank but the first, and follow its driver to the end.

    Raises:
        ConfigError, CheckpointError: the configuration or the checkpoint cannot work.
    """
    worker = worker_of(start_rank(config, info, show_progress=False))
    settle()
    worker.run()


def worker_of(rank: StartedRank) -> Worker:
    """Worker of a started rank that is not rank 0 of the job."""
    if rank.bridge is None:
        return Follower(rank)
    if rank.pool.name == "prefill":
        return PrefillRank(rank)
    return DecodeDriver(rank) if rank.bridge.rank == rank.pool.first else DecodeRank(rank)
