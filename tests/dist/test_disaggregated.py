"""A job with separate decode ranks gives what one rank gives, whatever the shapes of its two sides."""

from __future__ import annotations

import families
import pytest
from disaggregated_run import run_disaggregated
from engine_run import run_engine

LENGTHS = (5, 1, 40, 16, 77, 200, 33, 129, 64)
PARAMS = [
    dict(temperature=0.0),
    dict(seed=1),
    dict(seed=2, temperature=0.7, top_p=0.9, logprobs=3),
    dict(seed=3, top_k=5, n=3),
    dict(seed=4, min_p=0.05, repetition_penalty=1.3),
    dict(seed=5, presence_penalty=0.5, frequency_penalty=0.5, logprobs=0),
    dict(temperature=0.0, stop_token_ids=(17, 55, 80, 99, 101, 102), min_tokens=6),
    dict(seed=6, ignore_eos=True, max_tokens=50),
    dict(seed=7, max_tokens=1),
]
# prefill tp, sp | decode ranks, tp
SHAPES = [(1, 1, 1, 1), (1, 2, 2, 2), (2, 1, 1, 1), (1, 1, 3, 1)]


def requests(max_tokens=24):
    prompts = families.prompts(LENGTHS, seed=3)
    return [
        (prompt, dict(max_tokens=max_tokens) | params)
        for prompt, params in zip(prompts, PARAMS, strict=True)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3")
    families.save_family("llama3-rope", folder)
    return dict(model=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def one_rank(model):
    return run_engine(model, requests())


def tokens(outputs):
    return [[c.token_ids for c in output.completions] for output in outputs]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_are_those_of_one_rank(model, one_rank, shape):
    tp, sp, decode_ranks, decode_tp = shape
    ran = run_disaggregated(
        model, requests(), tp=tp, sp=sp, decode_ranks=decode_ranks, decode_tp=decode_tp
    )
    assert tokens(ran.outputs) == tokens(one_rank)
    for mine, theirs in zip(ran.outputs, one_rank, strict=True):
        for one, other in zip(mine.completions, theirs.completions, strict=True):
            assert one.finish_reason == other.finish_reason
            if other.logprobs is not None:
                assert [e.token_id for e in one.logprobs] == [e.token_id for e in other.logprobs]
                values = [e.logprob for e in other.logprobs]
                assert [e.logprob for e in one.logprobs] == pytest.approx(values, abs=1e-4)
