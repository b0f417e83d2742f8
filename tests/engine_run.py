"""Runs the engine on all ranks of a test and brings back plain results; used by tests in `dist`."""

from __future__ import annotations

import os
from typing import Any

from harness import free_port, run_ranks

Request = tuple[list[int], dict[str, Any]]  # prompt tokens, fields of SamplingParams


def run_engine(
    options: dict[str, Any], requests: list[Request], *, tp: int = 1, sp: int = 1, **extra: Any
) -> list[Any]:
    """Outputs of `requests` in order. `options` are EngineConfig's, with `cache`, `scheduler` as
    dicts, and `sp_levels`; `extra` goes to `engine_on_rank`."""
    port = free_port()
    results = run_ranks(
        engine_on_rank, tp * sp, port, options, requests, tp, sp, timeout=300, **extra
    )
    return results[0]


def engine_on_rank(
    rank: int,
    port: int,
    options: dict[str, Any],
    requests: list[Request],
    tp: int,
    sp: int,
    poison: int | None = None,
    abort: tuple[int, int] | None = None,
    stagger: int = 0,
    waves: tuple[int, ...] = (),
) -> list[Any] | None:
    """RequestOutputs by request, on rank 0. `poison` is a token whose embedding becomes NaN;
    `abort=(request, step)` drops a request before a step: its output is then None. With `stagger` a
    request comes that many steps after the one before; requests from each number in `waves` on come
    when all before are finished."""
    from sps2_mega.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
    from sps2_mega.engine.start import driver_of, worker_of
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.parallel.launcher import from_environment
    from sps2_mega.types import SamplingParams

    os.environ["MASTER_PORT"] = str(port)
    options = dict(options)
    cache = CacheConfig(**options.pop("cache", {}))
    scheduler = SchedulerConfig(**options.pop("scheduler", {}))
    parallel = ParallelConfig(tp=tp, sp=sp, sp_levels=options.pop("sp_levels", None))
    config = EngineConfig(parallel=parallel, cache=cache, scheduler=scheduler, **options)
    started = start_rank(config, from_environment(), show_progress=False)
    if poison is not None:
        assert tp == 1, "the poisoned row would be on one TP rank only"
        started.executor.model.weights()["embedding.word_embeddings.weight"].data[poison] = float(
            "nan"
        )
    if rank > 0:
        worker_of(started).run()
        return None
    engine = driver_of(started)
    results: list[Any] = [None] * len(requests)
    coming = list(enumerate(requests))
    step = 0
    while coming or engine.has_work():
        while coming and coming[0][0] * stagger <= step:
            if coming[0][0] in waves and engine.has_work():
                break
            number, (prompt, params) = coming.pop(0)
            refusal = engine.add_request(str(number), prompt, SamplingParams(**params))
            if refusal is not None:
                results[number] = refusal
        if abort is not None and abort[1] == step:
            assert engine.abort(str(abort[0]))
        for output in engine.step():
            results[int(output.request_id)] = output
        step += 1
    assert engine.step() == []  # idle: the scheduler checks its integrity
    assert engine.stats().kv_usage == 0.0
    engine.shutdown()
    return results
