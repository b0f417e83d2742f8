"""Run a job with separate decode ranks on the ranks of a test and bring back plain results."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from harness import free_port, run_ranks

Request = tuple[list[int], dict[str, Any]]  # prompt tokens, fields of SamplingParams


@dataclass
class Ran:
    """`outputs` by request (None: aborted, or a Refusal), final `stats`, streamed `deltas`."""

    outputs: list[Any]
    stats: Any
    deltas: list[Any]


def run_disaggregated(
    options: dict[str, Any],
    requests: list[Request],
    *,
    tp: int = 1,
    sp: int = 1,
    decode_ranks: int = 1,
    decode_tp: int = 1,
    **extra: Any,
) -> Ran:
    """`options` are EngineConfig's, `cache`, `scheduler` as dicts; `extra` is `job_on_rank`'s."""
    parallel = dict(tp=tp, sp=sp, decode_ranks=decode_ranks, decode_tp=decode_tp)
    world_size = tp * sp + decode_ranks
    args = (free_port(), options, requests, parallel)
    return run_ranks(job_on_rank, world_size, *args, timeout=300, **extra)[0]


def job_on_rank(
    rank: int,
    port: int,
    options: dict[str, Any],
    requests: list[Request],
    parallel: dict[str, int],
    aborts: dict[int, int] | None = None,
    poison: int | None = None,
    stream: bool = False,
    leave_early: bool = False,
    drop_after_s: dict[int, float] | None = None,
    wave: int | None = None,
) -> Ran | None:
    """On rank 0 what came of it. `aborts[request]` is the number of steps with news after which it
    is dropped; `poison` is a token whose embedding becomes NaN on the prefill ranks; `leave_early`
    ends the job with all requests in flight. `drop_after_s[request]` are seconds after which it is
    dropped. Requests from number `wave` on come when those with such a time have ended."""
    engine = started(rank, port, options, parallel)
    if engine is None:
        return None
    from sps2_mega.types import SamplingParams

    if poison is not None:
        engine.model.weights()["embedding.word_embeddings.weight"].data[poison] = float("nan")
    results: list[Any] = [None] * len(requests)

    def add(numbers: range) -> None:
        for number in numbers:
            prompt, params = requests[number]
            results[number] = engine.add_request(
                str(number), prompt, SamplingParams(**params), stream=stream
            )

    wave = len(requests) if wave is None else wave
    add(range(wave))
    began, drops = time.monotonic(), dict(drop_after_s or {})
    deltas: list[Any] = []
    aborts = dict(aborts or {})
    deadline = time.monotonic() + 120
    while engine.has_work() or wave < len(requests):
        for number, seconds in list(drops.items()):
            if time.monotonic() - began >= seconds:
                del drops[number]
                assert engine.abort(str(number)) == (results[number] is None)
        if not drops and wave < len(requests):
            add(range(wave, len(requests)))
            wave = len(requests)
        assert time.monotonic() < deadline, engine.stats()
        for number, after in list(aborts.items()):
            if engine.stats().num_steps >= after:
                del aborts[number]
                assert engine.abort(str(number)) == (results[number] is None)
        for output in engine.step():
            results[int(output.request_id)] = output
        deltas += engine.take_deltas()
        if leave_early and engine.stats().num_steps > 5:
            break
    stats = engine.stats()
    if not leave_early:
        assert engine.step() == []  # idle: the scheduler checks its integrity
        assert stats.kv_usage == 0.0
        assert stats.num_running == stats.num_waiting == 0
    engine.shutdown()
    return Ran(results, stats, deltas)


def started(rank: int, port: int, options: dict[str, Any], parallel: dict[str, int]) -> Any:
    """The engine on rank 0. The other ranks follow it to its end and get None."""
    from sps2_mega.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
    from sps2_mega.engine.start import run_worker, start_driver
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    options = dict(options)
    config = EngineConfig(
        parallel=ParallelConfig(**parallel),
        cache=CacheConfig(**options.pop("cache", {})),
        scheduler=SchedulerConfig(**options.pop("scheduler", {})),
        **options,
    )
    if rank == 0:
        return start_driver(config, from_environment())
    run_worker(config, from_environment())
    return None
