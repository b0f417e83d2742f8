"""Decode under CSA: the same tokens on every layout, other ones than dense decode, and dense where
all is near."""

from __future__ import annotations

import families
import pytest
from engine_run import assert_same, run_engine

from sps2_mega.config import CSAConfig

LENGTHS = (130, 1, 77, 40, 16)
CSA = CSAConfig(degrees=(1, 3), spans=(24,), sinks=2, halo=4, tail=8)


def requests(max_tokens=30):
    prompts = families.prompts(LENGTHS, seed=5)
    params = dict(max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    return [(prompt, params | dict(seed=i)) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def sparse(model):
    return model | dict(csa=CSA, decode_attention="csa")


@pytest.fixture(scope="module")
def one_rank(sparse):
    return run_engine(sparse, requests())


def logprobs(outputs):
    return [entry.logprob for output in outputs for entry in output.completions[0].logprobs]


@pytest.mark.parametrize(("tp", "sp"), [(1, 2), (2, 2), (1, 4)])
def test_same_tokens_on_every_layout(sparse, one_rank, tp, sp):
    assert_same(run_engine(sparse, requests(), tp=tp, sp=sp), one_rank)


def test_one_at_a_time_and_in_blocks_that_no_degree_divides(sparse, one_rank):
    options = sparse | dict(scheduler=dict(max_running=1), cache=dict(block_size=5, num_blocks=80))
    assert_same(run_engine(options, requests(), sp=2), one_rank)


def test_far_keys_are_left_out(sparse, one_rank):
    dense = run_engine(sparse | dict(decode_attention="dense"), requests())
    first = [output.completions[0].logprobs[0].logprob for output in dense]
    # The prompt is prefilled alike, so the first token is; the ones after it see less.
    assert first == [output.completions[0].logprobs[0].logprob for output in one_rank]
    assert logprobs(dense) != pytest.approx(logprobs(one_rank), abs=1e-3)


def test_within_one_cell_it_is_dense(sparse):
    csa = CSAConfig(degrees=(1, 3), spans=(4096,), sinks=0, halo=0, tail=0)
    one_cell = run_engine(sparse | dict(csa=csa), requests(12))
    assert_same(one_cell, run_engine(sparse | dict(csa=CSAConfig()), requests(12)))
