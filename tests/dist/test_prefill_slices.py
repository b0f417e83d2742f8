"""Prefills that yield to decodes, between layers or chunks, give the tokens of whole ones."""

from __future__ import annotations

import families
import pytest
from engine_run import assert_same, requests_beside_decodes, run_engine

from sps2_mega.config import CSAConfig

# Under a target of 1 ms a slice has half the time of a decode step: one layer, or some blocks of a
# prompt in one.
LAYOUTS = [
    (1, 1, "ulysses", 1.0),
    (1, 2, "auto", 1.0),
    (1, 3, "ring", 15.0),
    (2, 2, "gather", 1.0),
]
ONE_LAYER = dict(tbt_target_ms=1.0)


@pytest.fixture(scope="module")
def requests():
    return requests_beside_decodes(320, 650)


@pytest.fixture(scope="module")
def expected(model, requests):
    return run_engine(model | dict(cache=dict(no_prefix_caching=True)), requests)


@pytest.mark.parametrize(("tp", "sp", "transport", "target_ms"), LAYOUTS, ids=str)
def test_slices_and_chunks_give_the_tokens_of_whole_prompts(
    model, requests, expected, tp, sp, transport, target_ms
):
    options = model | dict(transport=transport, scheduler=dict(tbt_target_ms=target_ms))
    assert_same(run_engine(options, requests, tp=tp, sp=sp, stagger=2), expected)


def test_preemption_of_suspended_prefills(model, requests, expected):
    options = model | dict(scheduler=ONE_LAYER, cache=dict(num_blocks=24))
    assert_same(run_engine(options, requests, sp=2, stagger=1), expected)


def test_aborts_between_slices(model, requests, expected):
    options = model | dict(scheduler=ONE_LAYER)
    for step in (14, 17):
        outputs = run_engine(options, requests, sp=2, stagger=2, abort=(6, step))
        assert outputs[6] is None
        assert_same(outputs[:6] + outputs[7:], expected[:6] + expected[7:])


@pytest.mark.parametrize("spans", [(48,), None], ids=["spans", "topology"])
def test_sparse_prompts_are_the_same_wherever_they_are_cut(model, requests, spans):
    """Chunks are of some blocks: the exact tail of 50 tokens is cut, too."""
    csa = CSAConfig(degrees=(1, 4), spans=spans, sinks=4, halo=10, tail=50)
    options = model | dict(csa=csa, cache=dict(no_prefix_caching=True))
    whole = run_engine(options, requests, sp=2, stagger=2)
    assert_same(run_engine(options | dict(scheduler=ONE_LAYER), requests, sp=2, stagger=2), whole)


def test_a_sliced_prompt_without_finite_logits_fails_alone(model, requests, expected):
    poison = families.VOCAB - 1
    texts = families.prompts((90, 20), seed=7)
    bad = ([*texts[0], poison, *texts[1]], dict(max_tokens=24))
    asked = [*requests[:3], bad, (texts[0] + [3], dict(max_tokens=24)), *requests[3:]]
    options = model | dict(scheduler=ONE_LAYER, cache=dict(num_blocks=80), transport="ring")
    outputs = run_engine(options, asked, sp=2, poison=poison, stagger=1)
    assert "no finite logits" in outputs[3].error
    assert outputs[4].error is None
    assert_same(outputs[:3] + outputs[5:], expected)


def test_an_abort_between_slices_leaves_the_rest_of_its_group(model, requests, expected):
    """Without decodes, prompts that arrive together are one group, which then loses a member."""
    options = model | dict(scheduler=dict(tbt_target_ms=1.0, overtake=0.0))
    together = [1, 3, 4]
    for step in (1, 2):
        outputs = run_engine(options, [requests[i] for i in together], sp=2, abort=(1, step))
        assert outputs[1] is None
        assert_same([outputs[0], outputs[2]], [expected[1], expected[4]])
