"""Every family on every layout and transport gives transformers' logits, and its greedy text."""

from __future__ import annotations

import os
from pathlib import Path

import families
import pytest
import torch
from harness import free_port, run_ranks
from model_run import TRANSPORTS, assert_logits

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]
GREEDY_LENGTHS = (1, 3, 16, 17, 50, 129, 333, 700)
NEW_TOKENS = 64
TOLERANCE = 1e-4  # float32, logits of magnitude ~5


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Per family: folder, logits of every position of every prompt, greedy continuations."""
    answers = {}
    for name in families.FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        model = families.save_family(name, folder)
        with torch.inference_mode():
            logits = [model(torch.tensor([p])).logits[0] for p in families.prompts()]
            texts = []
            for prompt in families.prompts(GREEDY_LENGTHS, seed=1):
                ids = torch.tensor([prompt])
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                )
                texts.append(out[0, len(prompt) :].tolist())
        answers[name] = (folder, logits, texts)
    return answers


@pytest.mark.parametrize(("tp", "sp"), LAYOUTS, ids=lambda degree: str(degree))
def test_logits(oracle, tp, sp):
    assert_logits(
        {name: logits for name, (_, logits, _) in oracle.items()},
        {name: folder for name, (folder, _, _) in oracle.items()},
        families.prompts(),
        tp=tp,
        sp=sp,
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize(("tp", "sp"), LAYOUTS, ids=lambda degree: str(degree))
def test_greedy_text_of_a_mixed_batch(oracle, tp, sp):
    for number, (name, (folder, _, expected)) in enumerate(oracle.items()):
        transport = TRANSPORTS[(number + tp) % len(TRANSPORTS)]
        port = free_port()
        results = run_ranks(
            generate_on_rank, tp * sp, str(folder), tp, sp, transport, port, timeout=300
        )
        assert results[0] == expected, (name, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_short_prompt_leaves_ranks_without_tokens(oracle, transport):
    folder, _, expected = oracle["qwen3"]
    port = free_port()
    results = run_ranks(generate_on_rank, 4, str(folder), 1, 4, transport, port, 1, timeout=300)
    assert results[0] == expected[:1]


def generate_on_rank(rank, folder: str, tp, sp, transport, port, num_prompts=None):
    """Greedy tokens of the prompts (rank 0), through the engine, with a cache so small that it
    preempts."""
    from sps2_mega.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
    from sps2_mega.engine.start import driver_of, worker_of
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.parallel.launcher import from_environment
    from sps2_mega.types import SamplingParams

    os.environ["MASTER_PORT"] = str(port)
    assert Path(folder).is_dir()
    config = EngineConfig(
        model=folder,
        dtype="float32",
        transport=transport,
        parallel=ParallelConfig(tp=tp, sp=sp),
        cache=CacheConfig(num_blocks=112 // sp),
        scheduler=SchedulerConfig(max_prefill_tokens=512),
    )
    started = start_rank(config, from_environment(), show_progress=False)
    if rank > 0:
        worker_of(started).run()
        return None
    engine = driver_of(started)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    prompts = families.prompts(GREEDY_LENGTHS, seed=1)[:num_prompts]
    for number, prompt in enumerate(prompts):
        refusal = engine.add_request(str(number), prompt, params)
        assert refusal is None
    finished = {}
    while engine.has_work():
        for output in engine.step():
            finished[int(output.request_id)] = output.completions[0].token_ids
    assert engine.stats().kv_usage == 0.0
    engine.shutdown()
    return [finished[number] for number in range(len(prompts))]
