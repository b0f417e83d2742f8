"""The `serve` command on one rank: rank 0 listens, drives and answers, the others follow.

    bind the port -> answer 503 -> other ranks, weights, cache -> ready -> serve -> drain -> end

This module decides the order of actions and the exit code: 0 after a drain, 2 could not start, else
the guard's. `cli` parses flags, `http` handles requests.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING

from sps2_mega.config import EngineConfig
from sps2_mega.errors import CheckpointError, ConfigError
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.serving.http.settings import DEFAULT_MAX_QUEUE, ServerConfig, model_name

if TYPE_CHECKING:
    import socket

    from sps2_mega.engine.start import Driver
    from sps2_mega.engine.startup.start_rank import StartedRank
    from sps2_mega.serving.http.async_engine import AsyncEngine, ServedModel

EXIT_COULD_NOT_START = 2
# Seconds beyond the drain: the current step, and telling all ranks.
_ENDING_S = 5.0


def run_serve(config: EngineConfig, server: ServerConfig, info: LaunchInfo) -> int:
    """Run to the end on this rank; return its exit code."""
    return _lead(config, server, info) if info.rank == 0 else _follow(config, server, info)


def _lead(config: EngineConfig, server: ServerConfig, info: LaunchInfo) -> int:
    from sps2_mega.comm.crash_report import on_end
    from sps2_mega.comm.guard import guard
    from sps2_mega.serving.http.async_engine import AsyncEngine
    from sps2_mega.serving.http.prometheus import ServerMetrics
    from sps2_mega.serving.http.server import bind

    began = time.monotonic()
    max_queue = config.scheduler.max_waiting
    async_engine = AsyncEngine(
        max_samples=config.scheduler.max_running
        + (DEFAULT_MAX_QUEUE if max_queue is None else max_queue),
        request_timeout=server.request_timeout,
        metrics=ServerMetrics(model_name(server, config.model)),
    )

    def on_stop(cause: str) -> float:
        if not async_engine.drain_soon(server.drain_timeout):
            return 0.0
        sys.stderr.write(f"sps2_mega is shutting down: {cause}; a second signal ends it at once\n")
        sys.stderr.flush()
        return server.drain_timeout + _ENDING_S

    with guard(info, on_stop=on_stop):
        try:
            try:
                listener = bind(server.host, server.port)
            except ConfigError as error:
                if info.world_size > 1:
                    from sps2_mega.mcore.init import refuse

                    refuse(info, str(error))
                raise
            on_end(async_engine.fail_soon)
            _serve(config, server, info, async_engine, listener, began=began)
        except (ConfigError, CheckpointError) as error:
            return _could_not_start(error, info)
    return 0


def _follow(config: EngineConfig, server: ServerConfig, info: LaunchInfo) -> int:
    from sps2_mega.comm.guard import guard
    from sps2_mega.serving.rank import patience

    # Rank 0 drains, and its shutdown ends the other ranks.
    grace_s = server.drain_timeout + 2 * _ENDING_S
    with guard(info, on_stop=lambda _: patience(grace_s)):
        try:
            from sps2_mega.engine.start import run_worker

            run_worker(config, info)
        except (ConfigError, CheckpointError) as error:
            return _could_not_start(error, info)
    return 0


def _serve(
    config: EngineConfig,
    server: ServerConfig,
    info: LaunchInfo,
    async_engine: AsyncEngine,
    listener: socket.socket,
    *,
    began: float,
) -> None:
    from sps2_mega.engine.start import driver_of
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.garbage_collection import settle
    from sps2_mega.serving.http.app import build_app
    from sps2_mega.serving.http.engine_loop import run_engine
    from sps2_mega.serving.http.server import HttpServer, url_of
    from sps2_mega.serving.local_ranks import LocalRanks

    names = tuple(dict.fromkeys([model_name(server, config.model), config.model]))
    url = url_of(listener)
    http = HttpServer(build_app(async_engine, server, names), async_engine, listener)
    http.start()
    # `async_engine` bounds the queue, before a request is tokenised;
    # the scheduler takes what it admits.
    config = config.replace(scheduler=dataclasses.replace(config.scheduler, max_waiting=None))
    ranks = None
    if info.launcher == "none" and config.parallel.world_size > 1:
        ranks = LocalRanks(config, grace_s=server.drain_timeout + 2 * _ENDING_S)
        info = ranks.info
    try:
        started = start_rank(
            config,
            info,
            show_progress=True,
            on_stage=lambda stage: http.call_soon(async_engine.loading, stage),
        )
        engine = driver_of(started)
    except BaseException:
        if ranks is not None:
            ranks.close(told=False)
        raise
    settle()
    http.call_soon(async_engine.ready, _served_model(engine, started))
    sys.stdout.write(_memory_text(started))
    sys.stdout.write(_ready_line(url, names[0], engine, started, time.monotonic() - began))
    sys.stdout.flush()
    run_engine(
        engine, async_engine.commands, lambda result: http.call_soon(async_engine.deliver, result)
    )
    http.stop()
    engine.shutdown()
    if ranks is not None:
        ranks.close()
    sys.stdout.write("sps2_mega has stopped: all requests were answered or got an error\n")
    sys.stdout.flush()


def _served_model(engine: Driver, started: StartedRank) -> ServedModel:
    from sps2_mega.serving.http.async_engine import ServedFacts, ServedModel

    return ServedModel(
        tokenizer=engine.tokenizer,
        max_len=engine.max_model_len,
        refusal=engine.refusal,
        facts=ServedFacts(
            world_size=len(started.memory),
            pools=started.pools,
            sp_levels=started.sp_levels,
            device=started.compute.device.type,
            dtype=_dtype_name(started),
            transport=started.transport,
            max_model_len=engine.max_model_len,
            block_size=started.config.cache.block_size,
            kv_pools=engine.stats().kv_pools,
            memory=started.memory,
        ),
    )


def _memory_text(started: StartedRank) -> str:
    from sps2_mega.engine.startup.memory_table import memory_table, shortage

    tokens = started.num_blocks * started.config.cache.block_size
    pool = None if len(started.pools) == 1 else started.pool.name
    text = memory_table(started.memory, cache_tokens_per_rank=tokens, pool=pool) + "\n"
    warning = shortage(started.memory)
    return text if warning is None else f"{text}  warning: {warning}\n"


def _ready_line(url: str, name: str, engine: Driver, started: StartedRank, seconds: float) -> str:
    pools = ", ".join(
        f"{'' if pool.name == 'all' else f'{pool.name} '}tp={pool.tp} sp={pool.sp}"
        for pool in started.pools
    )
    return (
        f"sps2_mega is ready: {name} at {url}/v1, {pools} on "
        f"{started.compute.device.type} in {_dtype_name(started)}, context "
        f"{engine.max_model_len} tokens, "
        f"page at {url}/, after {seconds:.1f} s\n"
    )


def _dtype_name(started: StartedRank) -> str:
    return str(started.compute.dtype).removeprefix("torch.")


def _could_not_start(error: Exception, info: LaunchInfo) -> int:
    if info.local_rank == 0:
        sys.stderr.write(f"sps2_mega: error: {error}\n")
        sys.stderr.flush()
    return EXIT_COULD_NOT_START
