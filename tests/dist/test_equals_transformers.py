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
NEW_TOKENS = 17  # every sequence opens a block of 16
TOLERANCE = 1e-4  # float32, logits of magnitude ~5


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Per family: folder and transformers' model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in families.FAMILIES}
    return {name: (folder, families.save_family(name, folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def logits(oracle):
    """Per family: logits of every position of every prompt."""
    with torch.inference_mode():
        return {
            name: [model(torch.tensor([prompt])).logits[0] for prompt in families.prompts()]
            for name, (_, model) in oracle.items()
        }


@pytest.fixture(scope="module")
def greedy_texts(oracle):
    """Per family: greedy continuations by one rank, which are those of transformers: given the text
    before it, each token is the likeliest one of a single forward pass."""
    texts = {}
    for number, (name, (folder, model)) in enumerate(oracle.items()):
        texts[name] = greedy(folder, tp=1, sp=1, transport=TRANSPORTS[number % len(TRANSPORTS)])
        eos = model.config.eos_token_id
        prompts = families.prompts(GREEDY_LENGTHS, seed=1)
        for prompt, text in zip(prompts, texts[name], strict=True):
            with torch.inference_mode():
                rows = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
            assert rows.argmax(-1).tolist() == text, (name, len(prompt))
            assert eos not in text[:-1]
            assert len(text) == NEW_TOKENS or text[-1] == eos
    return texts


@pytest.mark.parametrize(("tp", "sp"), LAYOUTS, ids=lambda degree: str(degree))
def test_logits(oracle, logits, tp, sp):
    assert_logits(
        logits,
        {name: folder for name, (folder, _) in oracle.items()},
        families.prompts(),
        tp=tp,
        sp=sp,
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize(("tp", "sp"), LAYOUTS[1:], ids=lambda degree: str(degree))
def test_greedy_text_of_a_mixed_batch(oracle, greedy_texts, tp, sp):
    for number, (name, (folder, _)) in enumerate(oracle.items()):
        transport = TRANSPORTS[(number + tp) % len(TRANSPORTS)]
        text = greedy(folder, tp=tp, sp=sp, transport=transport)
        assert text == greedy_texts[name], (name, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_short_prompt_leaves_ranks_without_tokens(oracle, greedy_texts, transport):
    folder, _ = oracle["qwen3"]
    text = greedy(folder, tp=1, sp=4, transport=transport, num_prompts=1)
    assert text == greedy_texts["qwen3"][:1]


def greedy(folder, *, tp, sp, transport, num_prompts=None):
    """Greedy tokens of the prompts on `tp` x `sp` ranks."""
    where = tp * sp, str(folder), tp, sp, transport, free_port(), num_prompts
    return run_ranks(generate_on_rank, *where, timeout=300)[0]


def generate_on_rank(rank, folder: str, tp, sp, transport, port, num_prompts=None):
    """Greedy tokens of the prompts (rank 0), with a cache so small that it preempts."""
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
        cache=CacheConfig(num_blocks=90 // sp),  # at the end 94 are needed
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
