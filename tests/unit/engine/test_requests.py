"""The ledger admits, refuses, counts, streams and answers requests alike for both engines."""

from __future__ import annotations

import pytest
from tokenizer_samples import byte_level, save, sentencepiece

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.engine.requests import RequestLedger
from sps2_mega.engine.stats import KVUse
from sps2_mega.errors import Refusal, RequestError
from sps2_mega.scheduler.admission import Limits
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import FinishReason, PrefillItem, SamplingParams

LIMITS = Limits(max_model_len=64, cache_tokens=48, vocab_size=1000, eos_token_ids=frozenset({0}))
PROMPT = [1, 2, 3]


def new_ledger(tokenizer=None, max_waiting=None, limits=LIMITS) -> RequestLedger:
    return RequestLedger(tokenizer, limits, default_seed=5, max_waiting=max_waiting)


def add(ledger, name="a", prompt=PROMPT, num_waiting=0, stream=False, **params):
    return ledger.add(
        name, prompt, SamplingParams(**params), num_waiting=num_waiting, stream=stream
    )


def snapshot(ledger):
    pools = (
        KVUse(pool="prefill", blocks_per_rank=10, used_per_rank=(1, 2)),
        KVUse(pool="decode", blocks_per_rank=5, used_per_rank=(3, 4)),
    )
    return ledger.stats(num_running=1, num_waiting=2, kv_pools=pools, prefill_comm=CommSeconds())


def test_samples_share_the_prompt_and_have_seeds_and_ids_of_their_own():
    ledger = new_ledger()
    first = add(ledger, "a", n=2)
    second = add(ledger, "b", n=2, max_tokens=None)
    assert [sample.seq_id for sample in first + second] == [0, 1, 2, 3]
    assert all(sample.prompt_token_ids is PROMPT for sample in first)
    assert len({sample.seed for sample in first + second}) == 4
    assert second[0].max_tokens == LIMITS.max_len - len(PROMPT)
    again = new_ledger()
    assert [sample.seed for sample in add(again, "a", n=2)] == [sample.seed for sample in first]


def test_only_the_first_sample_scores_the_prompt():
    samples = add(new_ledger(), n=3, prompt_logprobs=2)
    assert [sample.params.prompt_logprobs for sample in samples] == [2, None, None]


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ([], {}, Refusal.EMPTY_PROMPT),
        ([1000], {}, Refusal.TOKEN_OUT_OF_RANGE),
        ([1], dict(stop_token_ids=(1000,)), Refusal.STOP_TOKEN_OUT_OF_RANGE),
        ([1] * 64, {}, Refusal.PROMPT_TOO_LONG),
        ([1] * 40, dict(max_tokens=10), Refusal.EXCEEDS_KV_CACHE),
    ],
)
def test_what_could_never_run_is_refused_and_leaves_nothing(prompt, params, reason):
    ledger = new_ledger()
    assert add(ledger, prompt=prompt, **params) is reason
    assert ledger.refusal(prompt, SamplingParams(**params)) is reason
    assert ledger.open_requests == []
    (sample,) = add(ledger)
    assert sample.seq_id == 0


@pytest.mark.parametrize("token", [-1, 1000, 2**40])
def test_tokens_out_of_range_do_not_reach_the_tokenizer(token, tmp_path):
    ledger = new_ledger(Tokenizer.load(save(sentencepiece(), tmp_path)))
    assert add(ledger, prompt=[token], stream=True, stop=("x",)) is Refusal.TOKEN_OUT_OF_RANGE


def test_an_id_is_taken_until_its_request_is_answered_or_dropped():
    ledger = new_ledger()
    (sample,) = add(ledger)
    assert add(ledger) is Refusal.DUPLICATE_ID
    assert ledger.drop("a") == [sample] and ledger.drop("a") == []
    assert ledger.live([sample.seq_id]) == []
    (sample,) = add(ledger)
    assert ledger.take_token(sample, 7, None, FinishReason.LENGTH, 1.0) is FinishReason.LENGTH
    (output,) = ledger.end(sample)
    assert output.request_id == "a"
    assert not isinstance(add(ledger), Refusal)


def test_all_samples_must_find_room_in_the_queue():
    ledger = new_ledger(max_waiting=3)
    assert add(ledger, n=2, num_waiting=2) is Refusal.QUEUE_FULL
    assert ledger.open_requests == []
    assert len(add(ledger, n=2, num_waiting=1)) == 2


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(RequestError, match="tokenizer"):
        add(new_ledger(), stop=("x",))


def test_a_request_is_answered_with_its_last_sample():
    ledger = new_ledger()
    first, second = add(ledger, n=2)
    assert ledger.take_token(second, 7, None, FinishReason.STOP, 1.0) is FinishReason.STOP
    assert ledger.end(second) == []
    assert ledger.live([0, 1]) == [first]
    assert ledger.take_token(first, 8, None, None, 1.0) is None
    assert ledger.take_token(first, 9, None, FinishReason.LENGTH, 2.0) is FinishReason.LENGTH
    (output,) = ledger.end(first)
    assert [done.token_ids for done in output.completions] == [[8, 9], [7]]
    assert ledger.open_requests == []


def test_a_sequence_without_finite_logits_makes_its_request_an_error():
    ledger = new_ledger()
    (sample,) = add(ledger)
    assert ledger.take_token(sample, None, None, None, 1.0) is FinishReason.ERROR
    (output,) = ledger.end(sample)
    assert output.completions == [] and "finite" in output.error
    assert snapshot(ledger).output_tokens == 0


def test_a_stop_string_ends_a_sequence_that_the_scheduler_let_go_on():
    tokenizer = Tokenizer(byte_level())
    ledger = new_ledger(
        tokenizer,
        limits=Limits(
            max_model_len=100,
            cache_tokens=100,
            vocab_size=tokenizer.vocab_size,
            eos_token_ids=frozenset(),
        ),
    )
    (sample,) = add(ledger, prompt=PROMPT, stop=("x",), max_tokens=9, stream=True)
    shown = tokenizer.encode("a", add_special_tokens=False)
    for token_id in shown:
        sample.take_token(token_id, None, 1.0)
        assert ledger.note_token(sample) is None
    (token_id,) = tokenizer.encode("x", add_special_tokens=False)
    sample.take_token(token_id, None, 2.0)
    assert ledger.note_token(sample) is FinishReason.STOP
    (output,) = ledger.end(sample)
    assert output.completions[0].text == "a"
    deltas = ledger.take_deltas()
    assert "".join(delta.text for delta in deltas) == "a"
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert ledger.take_deltas() == []


def test_prompt_tokens_are_counted_once_and_outputs_computed_again_are_not():
    ledger = new_ledger()

    def passed(start, end, num_prompt_tokens=8, num_shared_tokens=0):
        item = PrefillItem(
            0,
            [1] * 10,
            num_prompt_tokens,
            [0],
            [0],
            SamplingParams(),
            seed=0,
            start=start,
            end=end,
            num_shared_tokens=num_shared_tokens,
        )
        ledger.count_prompts([item])
        stats = snapshot(ledger)
        return stats.prompt_tokens, stats.cached_tokens

    assert passed(4, 6, num_shared_tokens=4) == (2, 4)
    assert passed(6, 8, num_shared_tokens=4) == (4, 4)
    assert passed(0, 10) == (12, 4)


def test_steps_of_one_turn_are_one_step_with_all_their_waits():
    ledger = new_ledger()
    (sample,) = ledger.add("a", PROMPT, SamplingParams(), num_waiting=0, arrival_time=1.0)
    ledger.begin_turn()
    ledger.count_step(2.0, [])
    assert snapshot(ledger).num_steps == 0
    for now in (3.0, 5.0):
        ledger.take_token(sample, 7, None, None, now)
        ledger.count_step(now, [sample])
    stats = snapshot(ledger)
    assert (stats.num_steps, stats.output_tokens) == (1, 2)
    assert (stats.last_waits.ttfts_s, stats.last_waits.gaps_s) == ((2.0,), (2.0,))
    ledger.begin_turn()
    ledger.take_token(sample, 7, None, None, 6.0)
    ledger.count_step(6.0, [sample])
    stats = snapshot(ledger)
    assert (stats.num_steps, stats.last_waits.gaps_s) == (2, (1.0,))


def test_a_request_for_no_tokens_counts_none():
    ledger = new_ledger()
    (sample,) = add(ledger, max_tokens=0)
    assert ledger.take_token(sample, 7, None, FinishReason.LENGTH, 1.0) is FinishReason.LENGTH
    (output,) = ledger.end(sample)
    assert output.completions[0].token_ids == []
    assert snapshot(ledger).output_tokens == 0


def test_use_of_the_kv_cache_is_that_of_all_pools():
    stats = snapshot(new_ledger())
    assert stats.kv_usage == 10 / 30
    assert [pool.pool for pool in stats.kv_pools] == ["prefill", "decode"]
