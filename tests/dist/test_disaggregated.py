"""A job with separate decode ranks equals one rank, whatever the shapes of its two pools."""

from __future__ import annotations

import families
import pytest
from disaggregated_history import random_history
from disaggregated_run import run_disaggregated, started
from engine_run import assert_same, run_engine, tokens
from harness import free_port, run_ranks

from sps2_mega.config import CSAConfig

LENGTHS = (5, 1, 40, 16, 77, 200, 33, 129, 64)
PARAMS = [
    dict(temperature=0.0),
    dict(seed=1, prompt_logprobs=1),
    dict(seed=2, temperature=0.7, top_p=0.9, logprobs=3),
    dict(seed=3, top_k=5, n=3),
    dict(seed=4, min_p=0.05, repetition_penalty=1.3),
    dict(seed=5, presence_penalty=0.5, frequency_penalty=0.5, logprobs=0),
    dict(temperature=0.0, stop_token_ids=(17, 55, 80, 99, 101, 102), min_tokens=6),
    dict(seed=6, ignore_eos=True, max_tokens=50, prompt_logprobs=3),
    dict(seed=7, max_tokens=0, prompt_logprobs=2, n=2),
]
# prefill tp, sp | decode ranks, tp
SHAPES = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 2, 2)]


def requests(max_tokens=24):
    prompts = families.prompts(LENGTHS, seed=3)
    return [
        (prompt, dict(max_tokens=max_tokens) | params)
        for prompt, params in zip(prompts, PARAMS, strict=True)
    ]


@pytest.fixture(scope="module")
def one_rank(model):
    return run_engine(model, requests())


def check_outputs(model, one_rank, shape):
    tp, sp, decode_ranks, decode_tp = shape
    ran = run_disaggregated(
        model, requests(), tp=tp, sp=sp, decode_ranks=decode_ranks, decode_tp=decode_tp
    )
    assert_same(ran.outputs, one_rank)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_are_those_of_one_rank(model, one_rank, shape):
    check_outputs(model, one_rank, shape)


def num_prefilled(stats):
    """Prompt tokens of all passes, computed or found in the cache."""
    return stats.prompt_tokens + stats.cached_tokens


def prompt_tokens_once(lines):
    return sum(len(prompt) * params.get("n", 1) for prompt, params in lines)


def test_sequences_that_lose_their_blocks_are_prefilled_again_and_go_on_as_they_were(model):
    """Short prompts with long answers, of which only two fit the cache to their end."""
    lines = [
        (prompt, params | dict(max_tokens=90 + 9 * number, ignore_eos=True, stop_token_ids=()))
        for number, (prompt, params) in enumerate(requests()[:6])
    ]
    lines = [(prompt[:23], params | dict(min_tokens=0)) for prompt, params in lines]
    ran = run_disaggregated(model | dict(cache=dict(block_size=4, num_blocks=66)), lines)
    assert tokens(ran.outputs) == tokens(run_engine(model, lines))
    assert num_prefilled(ran.stats) > prompt_tokens_once(lines)


def test_roomy_decode_ranks_preempt_nobody(model, one_rank):
    ran = run_disaggregated(model | dict(cache=dict(num_blocks=400)), requests())
    assert tokens(ran.outputs) == tokens(one_rank)
    assert num_prefilled(ran.stats) == prompt_tokens_once(requests())
    assert ran.stats.output_tokens == sum(len(t) for sample in tokens(one_rank) for t in sample)


def test_aborts_at_any_point_free_all_blocks(model, one_rank):
    """The job itself asserts that no block stays in use on either pool."""
    aborts = {0: 1, 2: 0, 3: 2, 4: 9, 5: 0, 7: 30}
    ran = run_disaggregated(
        model | dict(cache=dict(block_size=4, num_blocks=66)),
        requests(),
        decode_ranks=2,
        decode_tp=2,
        aborts=aborts,
    )
    # How far the others are when steps come so fast is chance; these two cannot have finished.
    assert ran.outputs[2] is None and ran.outputs[5] is None
    for number, output in enumerate(ran.outputs):
        if output is not None:
            assert tokens([output]) == tokens([one_rank[number]])
        else:
            assert number in aborts


def test_a_request_that_fails_leaves_the_others_and_the_blocks_whole(model, one_rank):
    """Token 7 is poisoned on the prefill pool; clean requests then reuse the blocks."""
    lines = requests()
    poisoned = [([*prompt, 7, *prompt], params) for prompt, params in lines[:3]]
    clean = [(prompt, params) for prompt, params in lines if 7 not in prompt]
    expected = [one for (prompt, _), one in zip(lines, one_rank, strict=True) if 7 not in prompt]
    assert len(clean) > 3
    ran = run_disaggregated(
        model | dict(cache=dict(block_size=4, num_blocks=120)),
        poisoned + clean,
        decode_ranks=2,
        poison=7,
    )
    assert all(output.error and not output.completions for output in ran.outputs[:3])
    assert tokens(ran.outputs[3:]) == tokens(expected)


def test_a_job_can_end_with_all_requests_in_flight(model):
    ran = run_disaggregated(model, requests(max_tokens=60), sp=2, leave_early=True)
    assert ran.outputs[0] is None


@pytest.mark.parametrize("family", ["mistral-window", "llama-one-kv-head"])
def test_other_models(tmp_path, family):
    """A sliding window; a KV head that both prefill ranks have."""
    families.save_family(family, tmp_path)
    model = dict(model=str(tmp_path), dtype="float32")
    ran = run_disaggregated(model, requests(), tp=2, decode_ranks=1)
    assert tokens(ran.outputs) == tokens(run_engine(model, requests()))


def stream_beside_a_prefill(rank, port, options, parallel):
    """Deltas of a stream between the submission of a long prompt and its first token, and what was
    left of the prompt."""
    engine = started(rank, port, options, parallel)
    if engine is None:
        return None
    from sps2_mega.types import SamplingParams

    long = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    endless = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)
    engine.add_request("stream", [3, 4, 5], endless, stream=True)
    while len(engine.take_deltas()) == 0:
        engine.step()
    engine.add_request("long", families.prompts((2000,), seed=1)[0], long)
    num_deltas = 0
    while not engine.step():
        num_deltas += len(engine.take_deltas())
    engine.shutdown()
    return num_deltas


def test_streams_go_on_while_a_prompt_is_prefilled_in_one_step(model):
    """Rank 0 passes tokens on although it runs that step itself."""
    roomy = dict(cache=dict(num_blocks=300))
    args = (free_port(), model | roomy, dict(decode_ranks=1))
    assert run_ranks(stream_beside_a_prefill, 2, *args)[0] >= 1


def test_sparse_prompts_keep_the_pattern_of_the_ranks_that_prefill_them(model):
    """Spans follow the prefill pool's two SP ranks; generated tokens see all keys."""
    sparse = model | dict(csa=CSAConfig(degrees=(1, 4), halo=8, tail=8), max_model_len=512)
    expected = run_engine(sparse, requests(), sp=2)
    ran = run_disaggregated(sparse, requests(), sp=2)
    assert tokens(ran.outputs) == tokens(expected)
    assert tokens(expected) != tokens(run_engine(model, requests()))


@pytest.mark.parametrize(
    ("parallel", "scheduler"),
    [
        (dict(sp=2, decode_ranks=1), dict(tbt_target_ms=0.001)),
        (dict(decode_ranks=2, decode_tp=2), dict(max_prefill_tokens=64)),
    ],
)
def test_random_histories_lose_nothing(model, parallel, scheduler):
    tight = dict(cache=dict(block_size=4, num_blocks=340), scheduler=scheduler)
    args = (free_port(), model | tight, parallel, 1, 40)
    history = run_ranks(random_history, 3, *args, timeout=200)[0]
    assert history.num_aborted and history.answered
    expected = run_engine(model, [request for request, _ in history.answered])
    assert [samples for _, samples in history.answered] == tokens(expected)


# From here on four ranks: the ranks of smaller jobs above stay alive from test to test.
def test_outputs_of_sp_prefill_and_tp_decode_are_those_of_one_rank(model, one_rank):
    check_outputs(model, one_rank, (1, 2, 2, 2))


LONG = dict(temperature=0.0, max_tokens=12, ignore_eos=True)
IN_SLICES = dict(
    scheduler=dict(tbt_target_ms=0.001)
)  # one layer per step, and chunks of long prompts


def long_and_short():
    prompts = families.prompts((1500, 7, 900, 1, 33), seed=5)
    return [(prompt, LONG) for prompt in prompts]


def test_keys_of_chunks_and_slices_arrive_as_well(model):
    ran = run_disaggregated(model | IN_SLICES, long_and_short(), sp=2, decode_ranks=2)
    assert tokens(ran.outputs) == tokens(run_engine(model, long_and_short()))


@pytest.mark.parametrize("seconds", [0.0, 0.03])
def test_long_prompts_can_be_dropped_between_their_chunks(model, seconds):
    """The job asserts that no block stays in use; later prompts find their own keys in them."""
    lines = long_and_short()
    again = [(prompt, LONG) for prompt in families.prompts((700, 3, 1100), seed=9)]
    ran = run_disaggregated(
        model | IN_SLICES | dict(cache=dict(block_size=4, num_blocks=500)),
        lines + again,
        sp=2,
        decode_ranks=2,
        drop_after_s={0: seconds, 2: seconds, 3: seconds},
        wave=len(lines),
    )
    assert tokens(ran.outputs[len(lines) :]) == tokens(run_engine(model, again))
    for number, output in enumerate(ran.outputs[: len(lines)]):
        assert output is not None or number in (0, 2, 3)
