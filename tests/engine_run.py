"""Run the engine on all ranks of a test, bring back plain results and compare them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import families
import pytest
from harness import free_port, run_ranks

LOGPROB_TOLERANCE = 1e-4  # float32, whatever the layout

Request = tuple[list[int], dict[str, Any]]  # prompt tokens, fields of SamplingParams


def run_engine(
    options: dict[str, Any], requests: list[Request], *, tp: int = 1, sp: int = 1, **extra: Any
) -> list[Any]:
    """Outputs of `requests` in order. `options` are EngineConfig's, with `cache`, `scheduler` as
    dicts, and `sp_levels` and `weights`; `extra` is `engine_on_rank`'s."""
    port = free_port()
    results = run_ranks(
        engine_on_rank, tp * sp, port, options, requests, tp, sp, timeout=300, **extra
    )
    return results[0]


def tokens(outputs: Sequence[Any]) -> list[list[list[int]]]:
    """Token ids by request and sample."""
    return [[completion.token_ids for completion in output.completions] for output in outputs]


def assert_same(outputs: Sequence[Any], expected: Sequence[Any]) -> None:
    """Same tokens, ends and log-probabilities of every sample and prompt, and no error."""
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.error is None
        for one, other in zip(output.completions, wanted.completions, strict=True):
            assert one.token_ids == other.token_ids
            assert one.finish_reason == other.finish_reason
            assert (one.logprobs is None) == (other.logprobs is None)
            for entry, reference in zip(one.logprobs or [], other.logprobs or [], strict=True):
                assert entry.token_id == reference.token_id
                assert entry.logprob == _near(reference.logprob)
                assert [token for token, _ in entry.top] == [token for token, _ in reference.top]
                assert [v for _, v in entry.top] == _near([v for _, v in reference.top])
        scores, reference = output.prompt_logprobs, wanted.prompt_logprobs
        assert (scores is None) == (reference is None)
        if reference is not None:
            assert (scores.first, scores.top_ids) == (reference.first, reference.top_ids)
            assert list(scores.own) == _near(list(reference.own))


def _near(values: Any) -> Any:
    return pytest.approx(values, abs=LOGPROB_TOLERANCE)


def requests_beside_decodes(first: int, second: int) -> list[Request]:
    """Two prompts of these lengths that, staggered, arrive while others decode; two other prompts
    share a prefix, and one request has two samples."""
    texts = families.prompts((33, 1, first, 16, 7, 129, second, 5), seed=6)
    texts[7] = texts[5][:100] + texts[7]
    params = [
        dict(max_tokens=60, temperature=0.0, ignore_eos=True),
        dict(max_tokens=50, seed=1, ignore_eos=True),
        dict(max_tokens=20, seed=2, n=2, logprobs=2),
        dict(max_tokens=24, temperature=0.0, presence_penalty=0.5),
        dict(max_tokens=1, seed=4),
        dict(max_tokens=9, seed=5, ignore_eos=True, repetition_penalty=1.2),
        dict(max_tokens=12, seed=6),
        dict(max_tokens=30, seed=7, ignore_eos=True),
    ]
    return list(zip(texts, params, strict=True))


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
    parallel = ParallelConfig(
        tp=tp,
        sp=sp,
        sp_levels=options.pop("sp_levels", None),
        weights=options.pop("weights", "owner"),  # "auto" measures, at every start
    )
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
