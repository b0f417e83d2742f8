"""Log-probabilities of prompts equal transformers', whatever chunks, caches and other requests.

Layouts are covered by `test_scoring`: both use the same function.
"""

from __future__ import annotations

import families
import pytest
import torch
from engine_run import run_engine

from sps2_mega.types import FinishReason

LENGTHS = (1, 2, 17, 130, 333)
SYSTEM = 48  # tokens: three whole blocks that all prompts begin with, but the two short ones


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Folder of the model, prompts, and log-probabilities after every position of each."""
    folder = tmp_path_factory.mktemp("qwen3")
    model = families.save_family("qwen3", folder)
    prompts = families.prompts(LENGTHS, seed=5)
    for prompt in prompts[3:]:
        prompt[:SYSTEM] = prompts[-1][:SYSTEM]
    with torch.inference_mode():
        rows = [model(torch.tensor([p])).logits[0].log_softmax(-1) for p in prompts]
    return str(folder), prompts, rows


def assert_scored(output, rows, num_top):
    prompt, scores = output.prompt_token_ids, output.prompt_logprobs
    assert (scores.first, scores.num_top, len(scores)) == (1, num_top, len(prompt) - 1)
    entries = [scores.entry(index, token_id) for index, token_id in enumerate(prompt[1:])]
    own = rows[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:], dtype=torch.int64)]
    assert [entry.logprob for entry in entries] == pytest.approx(own.tolist(), abs=1e-4)
    top = rows[:-1].topk(num_top).values.tolist()
    for entry, wanted, row in zip(entries, top, rows, strict=False):
        assert [value for _, value in entry.top] == pytest.approx(wanted, abs=1e-4)
        assert [row[token].item() for token, _ in entry.top] == pytest.approx(wanted, abs=1e-4)
        # Clients ask whether the token was the likeliest one by comparing the two.
        assert dict(entry.top).get(entry.token_id, entry.logprob) == entry.logprob


@pytest.mark.parametrize(
    ("tp", "sp", "options"),
    [
        (1, 2, dict(scheduler=dict(policy="sarathi", chunk_tokens=37))),
        (1, 2, dict(scheduler=dict(tbt_target_ms=0.01))),  # a slice is a layer, chunks are small
    ],
)
def test_scores_are_those_of_transformers_in_any_chunks(oracle, tp, sp, options):
    folder, prompts, rows = oracle
    counts = (3, 0, 20, 5, 1)
    requests = [
        (prompt, dict(max_tokens=0 if k % 2 else 3, temperature=0.0, logprobs=k, prompt_logprobs=k))
        for prompt, k in zip(prompts, counts, strict=True)
    ]
    # Others that decode meanwhile, or whose blocks could be shared, and who want no scores.
    plain = [(prompts[-1], dict(max_tokens=20, temperature=0.0)), (prompts[3], dict(max_tokens=1))]
    outputs = run_engine(
        dict(model=folder, dtype="float32", **options), [*plain, *requests], tp=tp, sp=sp, stagger=1
    )
    assert [output.prompt_logprobs for output in outputs[:2]] == [None, None]
    for output, row, k, (_, params) in zip(outputs[2:], rows, counts, requests, strict=True):
        assert_scored(output, row, k)
        (completion,) = output.completions
        assert len(completion.token_ids) == params["max_tokens"] == len(completion.logprobs)
        assert completion.finish_reason is FinishReason.LENGTH
        assert output.num_cached_tokens == 0


def test_samples_and_cached_prefixes_and_preemption(oracle):
    """A scored prompt takes nothing from the cache but leaves everything there; its samples share
    what the first one computed; and one that loses its blocks has its scores once."""
    folder, prompts, rows = oracle
    long = dict(max_tokens=60, temperature=0.0, seed=1)
    requests = [
        (prompts[3], dict(max_tokens=2, n=3, seed=1, prompt_logprobs=2)),
        (prompts[3], dict(max_tokens=2, seed=1)),
        (prompts[3], dict(max_tokens=2, n=2, seed=1, prompt_logprobs=1)),
        (prompts[4][:100], dict(long, prompt_logprobs=1)),
        (prompts[4][:99], dict(long, prompt_logprobs=1)),
        (prompts[2], dict(max_tokens=0, prompt_logprobs=20, n=2)),
    ]
    outputs = run_engine(
        dict(model=folder, dtype="float32", cache=dict(num_blocks=18)), requests, waves=(1, 2, 3)
    )
    assert_scored(outputs[0], rows[3], 2)
    assert len({tuple(c.token_ids) for c in outputs[0].completions}) == 3
    assert outputs[1].prompt_logprobs is None and outputs[1].num_cached_tokens == 128
    assert_scored(outputs[2], rows[3], 1)
    assert outputs[2].num_cached_tokens == 0
    assert_scored(outputs[3], rows[4][:100], 1)
    assert_scored(outputs[4], rows[4][:99], 1)
    assert [len(c.token_ids) for c in outputs[3].completions + outputs[4].completions] == [60, 60]
    assert_scored(outputs[5], rows[2], 20)
    assert [c.token_ids for c in outputs[5].completions] == [[], []]


def test_a_prompt_that_only_is_scored_may_fill_cache_and_context(oracle):
    folder, prompts, rows = oracle
    outputs = run_engine(
        dict(model=folder, dtype="float32", cache=dict(num_blocks=2), max_model_len=32),
        [
            (prompts[4][:32], dict(max_tokens=0, prompt_logprobs=1)),
            (prompts[4][:33], dict(max_tokens=0, prompt_logprobs=1)),
            (prompts[4][:32], dict(max_tokens=1, prompt_logprobs=1)),
        ],
    )
    assert_scored(outputs[0], rows[4][:32], 1)
    assert [output.value for output in outputs[1:]] == [outputs[1].value] * 2
