"""A random history of requests and aborts in a job with separate decode ranks, and what came of it;
used in `dist`."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

from disaggregated_run import Request, started

VOCAB = 130


@dataclass
class History:
    """`answered` are requests with the tokens of their samples."""

    answered: list[tuple[Request, list[list[int]]]] = field(default_factory=list)
    num_aborted: int = 0


def random_history(
    rank: int, port: int, options: dict[str, Any], parallel: dict[str, int], seed: int, num: int
) -> History | None:
    """`num` requests of very different lengths, some with a common beginning, a part of them
    aborted at any point. Asserts on rank 0 that nothing is lost and no block stays in use."""
    engine = started(rank, port, options, parallel)
    if engine is None:
        return None
    from sps2_mega.types import SamplingParams

    choose = random.Random(seed)
    common = [choose.randrange(1, VOCAB) for _ in range(300)]
    history, open_requests, num_added = History(), {}, 0
    deadline = time.monotonic() + 120
    while num_added < num or engine.has_work():
        assert time.monotonic() < deadline, (engine.stats(), sorted(open_requests))
        while num_added < num and len(open_requests) < 12 and choose.random() < 0.5:
            prompt, params = any_request(choose, common)
            name = str(num_added)
            if engine.add_request(name, prompt, SamplingParams(**params)) is None:
                open_requests[name] = prompt, params
            num_added += 1
        if open_requests and choose.random() < 0.03:
            name = choose.choice(list(open_requests))
            assert engine.abort(name)
            del open_requests[name]
            history.num_aborted += 1
        for output in engine.step():
            assert output.error is None
            samples = [completion.token_ids for completion in output.completions]
            history.answered.append((open_requests.pop(output.request_id), samples))
    assert not open_requests
    assert engine.step() == []
    assert engine.stats().kv_usage == 0.0
    engine.shutdown()
    return history


def any_request(choose: random.Random, common: list[int]) -> Request:
    length = choose.choice([1, 3, 16, 17, 50, 120, 400, 900])
    shared = common[: min(length, choose.choice([0, 64, 200]))]
    prompt = shared + [choose.randrange(1, VOCAB) for _ in range(length)]
    params = dict(
        max_tokens=choose.choice([1, 2, 10, 60, 150]),
        seed=choose.randrange(99),
        temperature=choose.choice([0.0, 1.0]),
        n=choose.choice([1, 1, 1, 3]),
        ignore_eos=choose.random() < 0.5,
        presence_penalty=choose.choice([0.0, 0.0, 0.7]),
    )
    return prompt, params
