"""Host time of a decode step in the real engine: scheduling, inputs, launches, sampling, the rest.

    plan     Scheduler.plan                          launch   the model's calls until they return
    inputs   plan -> tensors on the device           sample   sampling, until its calls return
    device   waiting for the sampled tokens          commit   Scheduler.commit
    answers  stop strings, text, what clients get    rest     everything else of Engine.step

With graphs a step is launched before the answers of the one before are processed: `answers` then
overlaps the device's work, and `device` is the remainder of that work.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.engine_rank import config_of
from benchmarks.gpu.part import Part
from sps2_mega.engine.engine import Engine
from sps2_mega.engine.start import start_driver
from sps2_mega.mcore.gpt import GPT
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.scheduler.scheduler import Scheduler
from sps2_mega.types import SamplingParams
from sps2_mega.worker import executor as executor_module
from sps2_mega.worker.decode_graphs import DecodeGraphs
from sps2_mega.worker.sampling.sampler import Drawn
from sps2_mega.worker.sampling.sampling_states import SamplingStates

_SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0.0),
    # Random weights give nearly equal logits; this makes them as steep as a trained model's.
    "top-p": dict(top_p=0.9, temperature=0.05, seed=1),
}
_PIECES = {
    "plan": [(Scheduler, "plan")],
    "inputs": [
        (executor_module, "decode_input"),
        (executor_module, "decode_tokens"),
    ],
    "launch": [
        (DecodeGraphs, "logits"),
        (GPT, "begin"),
        (GPT, "advance"),
        (GPT, "finish"),
        (GPT, "logits"),
    ],
    "sample": [(SamplingStates, "draw")],
    "device": [(Drawn, "tokens")],
    "commit": [(Scheduler, "commit")],
    "answers": [(Engine, "_answer")],
}


def run(part: Part) -> None:
    sizes = part.sizes
    longest = sizes.host_prompt + 3 * sizes.host_steps
    blocks = sizes.host_batch * (-(-longest // 16) + 1)
    for graphs in (False, True) if part.on_cuda else (False,):
        config = config_of(part, num_blocks=blocks, max_model_len=longest, graphs=graphs)
        engine = start_driver(config, from_environment())
        assert isinstance(engine, Engine)
        try:
            for name, params in _SAMPLINGS.items():
                what = {"case": "host", "sampling": name, "batch": sizes.host_batch}
                part.case(what | {"graphs": graphs}, partial(_timed, part, engine, params))
        finally:
            engine.shutdown()


def _timed(part: Part, engine: Engine, params: dict[str, Any]) -> dict[str, Any]:
    sizes = part.sizes
    sampling = SamplingParams(max_tokens=sizes.host_steps, ignore_eos=True, **params)
    for number in range(sizes.host_batch):
        tokens = [1 + (number + i) % 100 for i in range(sizes.host_prompt)]
        refusal = engine.add_request(f"{number}", tokens, sampling)
        assert refusal is None, refusal
    while engine.stats().num_running < sizes.host_batch:
        engine.step()
    steps: list[dict[str, float]] = []
    spent: defaultdict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        for piece, places in _PIECES.items():
            for owner, name in places:
                timed = _clocked(getattr(owner, name), piece, spent)
                stack.enter_context(patch.object(owner, name, timed))
        while engine.stats().num_running == sizes.host_batch:
            spent.clear()
            began = time.perf_counter()
            engine.step()
            spent["rest"] = time.perf_counter() - began - sum(spent.values())
            steps.append(dict(spent))
    while engine.has_work():
        engine.step()
    steady = steps[len(steps) // 4 : -1] or steps
    pieces = {name: statistics.median(step.get(name, 0.0) for step in steady) for name in spent}
    whole = [sum(step.values()) for step in steady]
    return {
        "steps": len(steady),
        "seconds": statistics.median(whole),
        "host_seconds": sum(taken for name, taken in pieces.items() if name != "device"),
        "pieces": pieces,
    }


def _clocked(call: Callable[..., Any], piece: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments, **options)
        spent[piece] += time.perf_counter() - began
        return result

    return timed
