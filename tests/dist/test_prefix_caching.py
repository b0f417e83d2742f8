"""Sharing the blocks of common prefixes changes what is computed, not the answers of one rank."""

from __future__ import annotations

import families
import pytest
from engine_run import assert_same, run_engine

from sps2_mega.config import CSAConfig

LAYOUTS = [
    (1, 1, "ulysses"),
    (2, 1, "gather"),
    (1, 2, "ring"),
    (1, 4, "gather"),
    (1, 4, "ulysses"),
]
NUM_FIRST = 7
NO_SHARING = dict(no_prefix_caching=True)


@pytest.fixture(scope="module")
def first_turns():
    """Three prompts with 50 tokens in common, one with three samples, and unrelated ones."""
    common, *texts = families.prompts((50, 1, 20, 33, 75, 200, 16), seed=8)
    greedy = dict(max_tokens=21, temperature=0.0, logprobs=1, ignore_eos=True)
    return [
        (common + texts[0], greedy),
        (common + texts[1], dict(max_tokens=9, seed=1, ignore_eos=True)),
        (common + texts[2], dict(max_tokens=30, seed=2, repetition_penalty=1.3)),
        (texts[3], dict(max_tokens=19, seed=3, n=3, ignore_eos=True)),
        (texts[4], greedy),
        (texts[5], greedy),
        ([5], dict(max_tokens=40, temperature=0.0, ignore_eos=True)),
    ]


@pytest.fixture(scope="module")
def requests(model, first_turns):
    """The first turns, a new question on each of them with its answer, and the same once more."""
    asked = list(first_turns)
    questions = families.prompts((7, 1, 64, 30, 16, 3, 12), seed=9)
    for _ in range(2):
        outputs = run_engine(model | dict(cache=NO_SHARING), asked[-NUM_FIRST:])
        asked += [
            (prompt + output.completions[0].token_ids + question, params)
            for (prompt, params), output, question in zip(
                asked[-NUM_FIRST:], outputs, questions, strict=True
            )
        ]
    return asked


@pytest.fixture(scope="module")
def expected(model, requests):
    outputs = run_engine(model | dict(cache=NO_SHARING), requests)
    assert all(output.num_cached_tokens == 0 for output in outputs)
    return outputs


@pytest.mark.parametrize(("tp", "sp", "transport"), LAYOUTS, ids=str)
def test_turns_samples_and_common_prefixes(model, requests, expected, tp, sp, transport):
    options = model | dict(transport=transport)
    waves = (NUM_FIRST, 2 * NUM_FIRST)
    outputs = run_engine(options, requests, tp=tp, sp=sp, waves=waves)
    assert_same(outputs, expected)
    found = [output.num_cached_tokens for output in outputs]
    # 50 tokens in common are 3 full blocks of 16; the first of the three computes them.
    assert found[:NUM_FIRST] == [0, 48, 48, 0, 0, 0, 0]
    for number in range(NUM_FIRST, len(requests)):
        prompt = requests[number - NUM_FIRST][0]
        answer = expected[number - NUM_FIRST].completions[0].token_ids
        # The last token of an answer was never fed.
        assert found[number] == (len(prompt) + len(answer) - 1) // 16 * 16


@pytest.mark.parametrize(("sp", "num_blocks"), [(1, 24), (3, 8)])
def test_eviction_and_preemption_in_a_small_cache(model, requests, expected, sp, num_blocks):
    options = model | dict(cache=dict(num_blocks=num_blocks), transport="gather")
    assert_same(run_engine(options, requests, sp=sp), expected)
    outputs = run_engine(options, requests, sp=sp, waves=(NUM_FIRST, 2 * NUM_FIRST))
    assert_same(outputs, expected)
    assert any(output.num_cached_tokens for output in outputs)


def test_blocks_that_do_not_divide_anything(model, requests, expected):
    options = model | dict(cache=dict(block_size=5, num_blocks=300), transport="ring")
    outputs = run_engine(options, requests, sp=3, stagger=2)
    assert_same(outputs, expected)


def test_a_request_without_finite_logits_leaves_the_prefix_it_shares_alone(model):
    """The failing ones begin with a prefix that others use before, at the same time and later."""
    poison = families.VOCAB - 1
    common, *texts = families.prompts((40, 9, 9, 9), seed=4)
    good = [(common + text, dict(max_tokens=12, temperature=0.0)) for text in texts]
    bad = [(common + [poison] * count, dict(max_tokens=12)) for count in (3, 30)]
    asked = [good[0], bad[0], good[1], bad[1], good[2], good[0]]
    reference = run_engine(model | dict(cache=NO_SHARING), good, poison=poison)
    for waves in ((), (1, 3, 5)):
        outputs = run_engine(model, asked, sp=2, poison=poison, waves=waves)
        assert [output.error is None for output in outputs] == [
            True,
            False,
            True,
            False,
            True,
            True,
        ]
        assert_same([outputs[i] for i in (0, 2, 4, 5)], [*reference, reference[0]])


def csa(spans):
    return dict(csa=CSAConfig(degrees=(1, 4), spans=spans, sinks=4, halo=8, tail=16))


@pytest.mark.parametrize("spans", [(32,), None], ids=str)
def test_under_csa_equal_prompts_share_and_change_nothing(model, spans):
    """Under spans from the ranks too: equal lengths have equal spans."""
    first, second = families.prompts((150, 61), seed=3)
    params = dict(max_tokens=15, seed=4, ignore_eos=True)
    asked = [(first, params | dict(n=2)), (second, params), (second, params), (first, params)]
    options = model | csa(spans)
    reference = run_engine(options | dict(cache=NO_SHARING), asked, sp=2)
    outputs = run_engine(options, asked, sp=2)
    assert_same(outputs, reference)
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 48, 144]


def test_under_csa_a_second_turn_is_the_same_on_any_number_of_ranks(model, first_turns, requests):
    asked = [first_turns[5], first_turns[4], requests[NUM_FIRST + 5], requests[NUM_FIRST + 4]]
    runs = [run_engine(model | csa((32,)), asked, sp=sp, waves=(2,)) for sp in (1, 4)]
    assert_same(runs[1], runs[0])
    assert runs[0][3].num_cached_tokens >= 192


def test_under_csa_chunks_give_the_tokens_of_whole_prompts(model):
    asked = [
        (prompt, dict(max_tokens=12, temperature=0.0, ignore_eos=True))
        for prompt in families.prompts((150, 16, 61), seed=3)
    ]
    options = model | csa(None)
    reference = run_engine(options, asked, sp=2)
    scheduler = dict(policy="sarathi", chunk_tokens=35)
    outputs = run_engine(options | dict(scheduler=scheduler), asked, sp=2, stagger=1)
    assert_same(outputs, reference)
