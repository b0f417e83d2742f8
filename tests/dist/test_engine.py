"""The engine on several ranks equals one rank: sampling, penalties, logprobs, n, stop, failures."""

from __future__ import annotations

import families
import pytest
from engine_run import assert_same, run_engine, tokens

from sps2_mega.errors import Refusal
from sps2_mega.types import FinishReason

LAYOUTS = [
    (2, 1, "ulysses"),
    (1, 2, "gather"),
    (1, 3, "ulysses"),
    (2, 2, "ulysses"),
    (1, 4, "gather"),
    (1, 3, "ring"),
    (2, 2, "auto"),
    (1, 3, "pass_q"),
]
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


def requests(lengths=LENGTHS, max_tokens=24):
    prompts = families.prompts(lengths, seed=3)
    return [
        (prompt, dict(max_tokens=max_tokens) | params)
        for prompt, params in zip(prompts, PARAMS, strict=False)
    ]


@pytest.fixture(scope="module")
def one_rank(model):
    return run_engine(model, requests())


def test_one_rank_does_what_was_asked(one_rank):
    assert [len(output.completions) for output in one_rank] == [1, 1, 1, 3, 1, 1, 1, 1, 1]
    assert len(set(map(tuple, tokens(one_rank)[3]))) == 3  # samples of one request differ
    assert one_rank[2].completions[0].logprobs[0].top[2][1] <= 0.0
    assert all(entry.top == () for entry in one_rank[5].completions[0].logprobs)
    stopped = one_rank[6].completions[0]
    assert len(stopped.token_ids) >= 6
    assert len(tokens(one_rank)[7][0]) == 50
    assert len(tokens(one_rank)[8][0]) == 1
    assert one_rank[8].completions[0].finish_reason is FinishReason.LENGTH
    assert one_rank[8].completions[0].timings.per_token_s is None


@pytest.mark.parametrize(("tp", "sp", "transport"), LAYOUTS, ids=str)
def test_same_seeds_same_tokens_on_every_layout(model, one_rank, tp, sp, transport):
    outputs = run_engine(model | dict(transport=transport), requests(), tp=tp, sp=sp)
    assert_same(outputs, one_rank)


def test_same_tokens_alone_and_with_other_batch_limits(model, one_rank):
    scheduler = dict(max_running=3, max_prefill_tokens=64)
    assert_same(run_engine(model | dict(scheduler=scheduler), requests()), one_rank)
    alone = [run_engine(model, [request])[0] for request in requests()[1:6:2]]
    assert_same(alone, one_rank[1:6:2])


@pytest.mark.parametrize(
    ("tp", "sp", "transport", "stagger"),
    [(1, 2, "ulysses", 3), (2, 2, "gather", 1), (1, 3, "ring", 3)],
)
def test_requests_that_come_while_others_decode(model, one_rank, tp, sp, transport, stagger):
    options = model | dict(transport=transport)
    assert_same(run_engine(options, requests(), tp=tp, sp=sp, stagger=stagger), one_rank)


def test_preempted_sequences_continue_with_the_same_tokens(model, one_rank):
    """The cache holds little more than the longest request: sequences preempt each other."""
    for sp in (1, 2):
        options = model | dict(cache=dict(num_blocks=18 // sp + 1, block_size=16))
        assert_same(run_engine(options, requests(), sp=sp), one_rank)


def test_block_size_does_not_matter(model, one_rank):
    for block_size in (1, 5):
        options = model | dict(cache=dict(block_size=block_size, num_blocks=1200 // block_size))
        assert_same(run_engine(options, requests(), sp=2), one_rank)


@pytest.mark.parametrize("sp", [1, 3])
def test_a_request_without_finite_logits_fails_alone(model, one_rank, sp):
    poison = families.VOCAB - 1  # no other prompt has it: it is the end-of-sequence token
    good = requests()
    bad = ([3, poison] * 40, dict(max_tokens=24))
    asked = [*good[:4], bad, *good[4:], *good]
    outputs = run_engine(model | dict(cache=dict(num_blocks=60)), asked, sp=sp, poison=poison)
    assert outputs[4].completions == []
    assert "no finite logits" in outputs[4].error
    assert_same(outputs[:4] + outputs[5:], one_rank + one_rank)


def test_abort_leaves_the_others_alone(model, one_rank):
    for step in (0, 1, 9):
        outputs = run_engine(model, requests(), sp=2, abort=(3, step))
        assert outputs[3] is None
        assert_same(outputs[:3] + outputs[4:], one_rank[:3] + one_rank[4:])


def test_what_cannot_run_is_refused_by_value(model):
    options = model | dict(cache=dict(num_blocks=4, block_size=16), max_model_len=100)
    asked = [
        ([], {}),
        ([1] * 100, {}),
        ([1, families.VOCAB], {}),
        ([1] * 50, dict(max_tokens=40)),
        ([1] * 50, dict(max_tokens=10)),
        ([1] * 99, dict(max_tokens=None)),
    ]
    outputs = run_engine(options, asked)
    assert outputs[:4] == [
        Refusal.EMPTY_PROMPT,
        Refusal.PROMPT_TOO_LONG,
        Refusal.TOKEN_OUT_OF_RANGE,
        Refusal.EXCEEDS_KV_CACHE,
    ]
    assert len(outputs[4].completions[0].token_ids) == 10
    assert outputs[5] is Refusal.EXCEEDS_KV_CACHE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_types(model, one_rank, dtype):
    """16-bit logits differ between layouts by rounding: first tokens compare by log-probability."""
    asked = [(prompt, dict(max_tokens=1, temperature=0.0, logprobs=5)) for prompt, _ in requests()]
    exact = run_engine(model, asked)
    for tp, sp, transport in [(1, 1, "ulysses"), (2, 2, "gather")]:
        outputs = run_engine(model | dict(dtype=dtype, transport=transport), asked, tp=tp, sp=sp)
        for output, reference in zip(outputs, exact, strict=True):
            (entry,), (wanted,) = (o.completions[0].logprobs for o in (output, reference))
            known = dict(wanted.top)
            assert entry.top[0][0] in known
            for token, logprob in entry.top[:2]:
                if token in known:
                    assert logprob == pytest.approx(known[token], abs=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_gpu(model, one_rank, dtype):
    """float32 gives the CPU's tokens; 16-bit types give its likeliest first tokens."""
    outputs = run_engine(model | dict(device="cuda", dtype=dtype), requests())
    if dtype == "float32":
        assert_same(outputs, one_rank)
    else:
        first = [output.completions[0].token_ids[0] for output in outputs]
        expected = [output.completions[0].token_ids[0] for output in one_rank]
        assert sum(a == b for a, b in zip(first, expected, strict=True)) >= len(first) - 1
