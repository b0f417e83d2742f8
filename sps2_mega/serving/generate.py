"""The `generate` command on one rank: rank 0 reads, drives and writes, the others follow.

This module decides the order of actions and the exit code; `cli` parses flags, `batch` does the
work. Exit codes: 0 all answered, 1 some lines failed, 2 could not run.
"""

from __future__ import annotations

import sys

from sps2_mega.config import EngineConfig
from sps2_mega.errors import CheckpointError, ConfigError
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.serving.batch import EXIT_COULD_NOT_RUN, BatchJob, BatchOptions


def run_generate(
    config: EngineConfig, options: BatchOptions, info: LaunchInfo, *, starts_ranks: bool
) -> int:
    """Run this rank to its end and return its exit code.

    Without a launcher, `starts_ranks` starts the other ranks on this machine.
    """
    from sps2_mega.comm.guard import guard

    with guard(info):
        try:
            if info.rank > 0:
                return _follow(config, info)
            return _lead(config, options, info, starts_ranks=starts_ranks)
        except (ConfigError, CheckpointError) as error:
            # Raised on all ranks alike, or on this one, which then
            # tells the others before it raises.
            return _could_not_run(error, info)


def _lead(
    config: EngineConfig, options: BatchOptions, info: LaunchInfo, *, starts_ranks: bool
) -> int:
    try:
        job = BatchJob.prepare(options, config)
    except ConfigError as error:
        if info.world_size > 1:
            from sps2_mega.mcore.init import refuse

            refuse(info, str(error))
        return _could_not_run(error, info)
    try:
        # Other ranks wait for this one in any case, so only a single rank may leave early.
        if job.num_left == 0 and info.world_size == 1:
            sys.stdout.write(f"nothing to do: all lines are answered in {options.output}\n")
            return job.exit_code
        code = _run(job, config, info, starts_ranks=starts_ranks)
    finally:
        job.close()
    sys.stdout.write(f"{job.totals.table()}\nanswers are in {options.output}\n")
    sys.stdout.flush()
    return code


def _run(job: BatchJob, config: EngineConfig, info: LaunchInfo, *, starts_ranks: bool) -> int:
    from sps2_mega.comm.watchdog import active_watchdogs
    from sps2_mega.engine.start import start_driver
    from sps2_mega.garbage_collection import settle
    from sps2_mega.serving.local_ranks import LocalRanks

    ranks = None
    if starts_ranks and info.launcher == "none" and config.parallel.world_size > 1:
        ranks = LocalRanks(config)
        info = ranks.info
    try:
        engine = start_driver(config, info, show_progress=sys.stderr.isatty())
        settle()
        code = job.run(engine)
        engine.shutdown()
    except BaseException:
        # Once ranks have met, the guard tells all of them why the job ends. If they ended before,
        # their end would be reported in place of this error.
        if ranks is not None and not active_watchdogs():
            ranks.close(told=False)
        raise
    if ranks is not None:
        ranks.close()
    return code


def _follow(config: EngineConfig, info: LaunchInfo) -> int:
    from sps2_mega.engine.start import run_worker

    run_worker(config, info)
    return 0


def _could_not_run(error: Exception, info: LaunchInfo) -> int:
    if info.local_rank == 0:
        sys.stderr.write(f"sps2_mega: error: {error}\n")
        sys.stderr.flush()
    return EXIT_COULD_NOT_RUN
