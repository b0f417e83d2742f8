"""Decode steps launched before the last answers are dealt with give the same answers.

On the CPU "graphs" just call again; on a GPU they are captured.
"""

from __future__ import annotations

import os
from typing import Any

import families
import pytest
from harness import free_port, run_ranks
from triton_device import DEVICES

LENGTHS = (40, 1, 17, 101, 90, 25)
LAST = 9  # tokens of request 3, which a stop string is found to end


@pytest.mark.parametrize("device", DEVICES)
def test_same_answers_whatever_ends_a_request_or_comes_in_between(device, tmp_path):
    pytest.importorskip("triton")
    families.save_family("qwen3", tmp_path)
    prompts = families.prompts(LENGTHS, seed=4)
    (found,) = run_ranks(both_ways, 1, str(tmp_path), prompts, device, free_port())
    plain, ahead = found["plain"], found["ahead"]
    assert ahead["answers"] == plain["answers"]
    assert ahead["streamed"] == plain["streamed"]
    assert len(plain["answers"]["3"][0]) == LAST
    assert plain["launched"] == 0
    assert ahead["launched"] > 20
    # One step more than is needed: the stop string was found when the next one had begun.
    assert ahead["steps"] <= plain["steps"] + 1


def both_ways(
    rank: int, folder: str, prompts: list[list[int]], device: str, port: int
) -> dict[str, Any]:
    """Answers of the same history, by an engine without graphs and one with."""
    from contextlib import ExitStack
    from dataclasses import replace
    from unittest.mock import patch

    import torch

    from sps2_mega.config import CacheConfig, EngineConfig
    from sps2_mega.engine.start import driver_of
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.kernels.paged_kv import triton as paged_kv
    from sps2_mega.parallel.launcher import from_environment
    from sps2_mega.text.output_processor import OutputProcessor
    from sps2_mega.worker.decode_graphs import CudaRecorder, DecodeGraphs
    from sps2_mega.worker.executor import Executor

    class CallsAgain:
        def capture(self, work):
            result = work().clone()
            return lambda: result.copy_(work()), result

    def check_stop(self, sequence):
        third = sequence.prompt_token_ids == prompts[3]
        return third and len(sequence.output_token_ids) == LAST

    os.environ["MASTER_PORT"] = str(port)
    config = EngineConfig(
        model=folder, dtype="float32", device=device, cache=CacheConfig(num_blocks=64)
    )
    found: dict[str, Any] = {}
    for kind in ("plain", "ahead"):
        started = start_rank(config, from_environment(), show_progress=False)
        old = started.executor
        if kind == "ahead":
            where = old.device
            recorder = CudaRecorder(where) if where.type == "cuda" else CallsAgain()
            executor = Executor(
                old.model,
                old.config,
                old.pool,
                old.groups,
                prefill=old.prefill,
                graphs=DecodeGraphs(old.model, old.pool, recorder, where),
                dtype=old.dtype,
                device=where,
            )
            started = replace(started, executor=executor)
        with ExitStack() as stack:
            # On the CPU the cache is written by torch, which knows no padding.
            if torch.device(device).type == "cpu":
                stack.enter_context(patch("sps2_mega.attention.step.append", paged_kv.append))
            stack.enter_context(patch.object(OutputProcessor, "check_stop", check_stop))
            finish = stack.enter_context(
                patch.object(Executor, "finish", autospec=True, side_effect=Executor.finish)
            )
            launch = stack.enter_context(
                patch.object(Executor, "launch", autospec=True, side_effect=Executor.launch)
            )
            found[kind] = history(driver_of(started), prompts) | {"launched": launch.call_count}
            assert finish.call_count == launch.call_count
    return found


def history(engine: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Requests that end by length, end token, stop string and abort; some arrive late."""
    from sps2_mega.types import SamplingParams

    def add(number: int, **params: Any) -> None:
        sampling = SamplingParams(seed=number, **params)
        assert engine.add_request(str(number), prompts[number], sampling, stream=True) is None

    add(0, max_tokens=5, temperature=0.0, logprobs=2)
    add(1, max_tokens=30, n=2, repetition_penalty=1.2)
    add(2, max_tokens=40, ignore_eos=True)
    add(3, max_tokens=30, ignore_eos=True)
    answers, streamed, steps = {}, {}, 0
    while engine.has_work():
        if steps == 6:
            add(4, max_tokens=3, temperature=0.0)
            assert engine.abort("2")
        if steps == 10:
            add(5, max_tokens=3)
        if steps == 11:  # its prefill is planned, and with graphs not begun
            assert engine.abort("5")
        for output in engine.step():
            answers[output.request_id] = [c.token_ids for c in output.completions]
            answers[output.request_id] += [
                (c.finish_reason, c.logprobs and [(p.token_id, len(p.top)) for p in c.logprobs])
                for c in output.completions
            ]
        for delta in engine.take_deltas():
            if delta.request_id not in ("2", "5"):
                streamed.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
        steps += 1
    assert engine.step() == []
    assert engine.stats().kv_usage == 0.0
    engine.shutdown()
    return {"answers": answers, "streamed": streamed, "steps": steps}
