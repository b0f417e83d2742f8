"""Chunks of prompts in steps with decodes give the tokens of whole prompts, on every layout."""

from __future__ import annotations

import families
import pytest
from engine_run import assert_same, requests_beside_decodes, run_engine

# 7 and 50 divide neither the prompts nor the blocks; with 7, most steps have one or two new tokens.
LAYOUTS = [
    (1, 1, "ulysses", 7),
    (2, 1, "ulysses", 50),
    (1, 2, "gather", 7),
    (1, 3, "ring", 50),
    (1, 4, "ulysses", 7),
    (2, 2, "ring", 50),
    (1, 4, "gather", 50),
]


@pytest.fixture(scope="module")
def requests():
    return requests_beside_decodes(200, 400)


@pytest.fixture(scope="module")
def expected(model, requests):
    return run_engine(model | dict(cache=dict(no_prefix_caching=True)), requests)


@pytest.mark.parametrize(("tp", "sp", "transport", "chunk_tokens"), LAYOUTS, ids=str)
def test_chunks_give_the_tokens_of_whole_prompts(
    model, requests, expected, tp, sp, transport, chunk_tokens
):
    options = model | dict(
        transport=transport, scheduler=dict(policy="sarathi", chunk_tokens=chunk_tokens)
    )
    outputs = run_engine(options, requests, tp=tp, sp=sp, stagger=2)
    assert_same(outputs, expected)


def test_without_shared_prefixes_and_with_odd_blocks(model, requests, expected):
    scheduler = dict(policy="sarathi", chunk_tokens=64, max_running=3)
    cache = dict(no_prefix_caching=True, block_size=5, num_blocks=400)
    options = model | dict(transport="gather", scheduler=scheduler, cache=cache)
    assert_same(run_engine(options, requests, sp=3, stagger=1), expected)


def test_preemption_in_the_middle_of_a_prompt(model, requests, expected):
    options = model | dict(
        scheduler=dict(policy="sarathi", chunk_tokens=30), cache=dict(num_blocks=15)
    )
    assert_same(run_engine(options, requests, sp=2, stagger=1), expected)


def test_abort_in_the_middle_of_a_prompt(model, requests, expected):
    options = model | dict(scheduler=dict(policy="sarathi", chunk_tokens=30))
    for step in (16, 20):
        outputs = run_engine(options, requests, sp=2, stagger=2, abort=(6, step))
        assert outputs[6] is None
        assert_same(outputs[:6] + outputs[7:], expected[:6] + expected[7:])


def test_a_chunked_prompt_without_finite_logits_fails_alone(model, requests, expected):
    poison = families.VOCAB - 1
    texts = families.prompts((90, 20), seed=7)
    bad = ([*texts[0], poison, *texts[1]], dict(max_tokens=24))
    asked = [*requests[:3], bad, (texts[0] + [3], dict(max_tokens=24)), *requests[3:]]
    scheduler = dict(policy="sarathi", chunk_tokens=40)
    options = model | dict(scheduler=scheduler, cache=dict(num_blocks=60), transport="ring")
    outputs = run_engine(options, asked, sp=2, poison=poison, stagger=1)
    assert "no finite logits" in outputs[3].error
    assert outputs[4].error is None
    assert_same(outputs[:3] + outputs[5:], expected)
