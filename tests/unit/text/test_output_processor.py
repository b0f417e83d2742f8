from __future__ import annotations

import time

import pytest
import tokenizer_samples as samples

from sps2_mega.errors import RequestError
from sps2_mega.logprobs import TokenLogprob
from sps2_mega.outputs import RequestOutput
from sps2_mega.text.output_processor import OutputProcessor
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import FinishReason, SamplingParams, Sequence


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(samples.save(samples.byte_level(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(
        samples.save(samples.sentencepiece(), tmp_path_factory.mktemp("tokenizer"))
    )


def sequence(seq_id: int, prompt: list[int], params: SamplingParams, **fields: object) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=prompt,
        params=params,
        seed=0,
        max_tokens=100,
        arrival_time=10.0,
        **fields,
    )


def run(
    tokenizer: Tokenizer,
    text: str,
    params: SamplingParams,
    *,
    ending: FinishReason = FinishReason.LENGTH,
) -> RequestOutput:
    """Feeds `text` token by token until a stop string or the end."""
    prompt = tokenizer.encode("p")
    one = sequence(1, prompt, params, scheduled_time=11.0)
    processor = OutputProcessor(tokenizer)
    processor.add("r", prompt, params, [one])
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        one.output_token_ids.append(token_id)
        one.token_times.append(12.0 + len(one.token_times))
        if processor.check_stop(one):
            one.finish_reason = FinishReason.STOP
            break
    one.finish_reason = one.finish_reason or ending
    output = processor.finished(one)
    assert output is not None
    return output


@pytest.mark.parametrize(
    ("stop", "include", "expected"),
    [
        (("\n\n",), False, "ab你 c"),
        (("\n\n",), True, "ab你 c\n\n"),
        (("你",), False, "ab"),
        (("c\n", "b"), False, "a"),
        (("b你 c", "zzz"), True, "ab你 c"),
        (("ab你 c\n\nd",), False, ""),
    ],
)
def test_text_ends_at_the_stop_string(tokenizer, sentencepiece, stop, include, expected) -> None:
    params = SamplingParams(stop=stop, include_stop_str_in_output=include)
    for kind in (tokenizer, sentencepiece):
        completion = run(kind, "ab你 c\n\nd and more", params).completions[0]
        # SentencePiece marks the start of the sample text as a word.
        assert completion.text.removeprefix(" ") == expected
        assert completion.finish_reason is FinishReason.STOP
        assert "more" not in kind.decode(completion.token_ids)


def test_without_a_hit_the_text_is_whole(tokenizer) -> None:
    completion = run(
        tokenizer, "nothing 你 here", SamplingParams(stop=("absent", "hereX"))
    ).completions[0]
    assert completion.text == "nothing 你 here"
    assert completion.finish_reason is FinishReason.LENGTH


def test_first_complete_stop_string_wins(tokenizer) -> None:
    params = SamplingParams(stop=("ab", "a"), include_stop_str_in_output=True)
    assert run(tokenizer, "xab", params).completions[0].text == "xa"


def test_min_tokens_lets_early_stop_strings_pass(tokenizer) -> None:
    params = SamplingParams(stop=("b",), min_tokens=5, max_tokens=9)
    assert run(tokenizer, "abababab", params).completions[0].text == "ababa"


def test_stop_token_and_eos_have_no_text(tokenizer) -> None:
    params = SamplingParams(stop_token_ids=tuple(tokenizer.encode("!", add_special_tokens=False)))
    output = run(tokenizer, "hey!", params, ending=FinishReason.STOP)
    assert output.completions[0].text == "hey"
    assert len(output.completions[0].token_ids) == 4
    assert run(tokenizer, "hey!", params, ending=FinishReason.LENGTH).completions[0].text == "hey!"
    shown = params.replace(include_stop_str_in_output=True)
    assert run(tokenizer, "hey!", shown, ending=FinishReason.STOP).completions[0].text == "hey!"


def test_stop_string_wins_over_length_on_the_same_token(tokenizer) -> None:
    params = SamplingParams(stop=("c",))
    one = sequence(1, [1], params)
    processor = OutputProcessor(tokenizer)
    processor.add("r", [1], params, [one])
    for token_id in tokenizer.encode("abc", add_special_tokens=False):
        one.output_token_ids.append(token_id)
        processor.check_stop(one)
    one.finish_reason = FinishReason.LENGTH
    completion = processor.finished(one).completions[0]
    assert (completion.text, completion.finish_reason) == ("ab", FinishReason.STOP)


def test_samples_of_a_request_come_together_and_in_order(tokenizer) -> None:
    params = SamplingParams(n=3, logprobs=0)
    sequences = [sequence(index, [1], params) for index in (7, 8, 9)]
    processor = OutputProcessor(tokenizer)
    processor.add("r", [1], params, sequences)
    for one, text in zip(sequences, "xyz", strict=True):
        one.output_token_ids += tokenizer.encode(text, add_special_tokens=False)
        one.logprobs.append(TokenLogprob(one.output_token_ids[0], -0.5))
        one.finish_reason = FinishReason.LENGTH
    sequences[0].num_cached_tokens, sequences[1].num_cached_tokens = 16, 32
    assert processor.finished(sequences[2]) is None
    assert processor.finished(sequences[0]) is None
    output = processor.finished(sequences[1])
    assert [completion.text for completion in output.completions] == ["x", "y", "z"]
    assert [completion.index for completion in output.completions] == [0, 1, 2]
    assert output.num_cached_tokens == 16, (
        "what the request found; later samples find its own prompt"
    )
    assert output.completions[1].logprobs[0].logprob == -0.5
    processor.add("r", [1], params, sequences)  # the id is free again


def test_timings(tokenizer) -> None:
    timings = run(tokenizer, "abcd", SamplingParams()).completions[0].timings
    assert (timings.queue_s, timings.ttft_s, timings.per_token_s, timings.total_s) == (
        1.0,
        2.0,
        1.0,
        5.0,
    )
    assert timings.gaps_s == (1.0, 1.0, 1.0)
    one = run(tokenizer, "a", SamplingParams()).completions[0].timings
    assert (one.per_token_s, one.gaps_s) == (None, ())


def test_aborted_in_the_queue(tokenizer) -> None:
    params = SamplingParams(stop=("x",))
    one = sequence(1, [1], params)
    one.arrival_time = time.monotonic()
    processor = OutputProcessor(tokenizer)
    processor.add("r", [1], params, [one])
    one.finish_reason = FinishReason.ABORT
    completion = processor.finished(one).completions[0]
    assert (completion.text, completion.token_ids) == ("", [])
    assert 0 <= completion.timings.queue_s == completion.timings.total_s < 5


def test_drop_forgets_everything(tokenizer) -> None:
    params = SamplingParams(stop=("x",), n=2)
    sequences = [sequence(index, [1], params) for index in (1, 2)]
    processor = OutputProcessor(tokenizer)
    processor.add("r", [1], params, sequences)
    processor.drop("r")
    processor.drop("never seen")
    sequences[0].output_token_ids += tokenizer.encode("x", add_special_tokens=False)
    assert not processor.check_stop(sequences[0])
    with pytest.raises(KeyError):
        processor.finished(sequences[0])


def test_without_tokenizer() -> None:
    processor = OutputProcessor(None)
    params = SamplingParams()
    one = sequence(1, [1], params, output_token_ids=[5], finish_reason=FinishReason.LENGTH)
    processor.add("r", [1], params, [one])
    assert not processor.check_stop(one)
    assert processor.finished(one).completions[0].text == ""
    with pytest.raises(RequestError, match="tokenizer"):
        processor.add("r", [1], SamplingParams(stop=("x",)), [one])


def test_cost_of_a_step_without_stop_strings(tokenizer) -> None:
    params = SamplingParams()
    sequences = [sequence(index, [1], params, output_token_ids=[5]) for index in range(16)]
    processor = OutputProcessor(tokenizer)
    for one in sequences:
        processor.add(str(one.seq_id), [1], params, [one])
    start = time.perf_counter()
    for _ in range(100):
        for one in sequences:
            processor.check_stop(one)
    assert (time.perf_counter() - start) / 100 < 0.2e-3


def test_stop_search_on_long_text_is_linear(tokenizer) -> None:
    params = SamplingParams(stop=("never appears",))
    start = time.perf_counter()
    assert len(run(tokenizer, "0123456789" * 3000, params).completions[0].text) == 30000
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", [samples.byte_level, samples.sentencepiece])
def test_an_end_token_leaves_no_text_whoever_named_it(tmp_path, kind, special) -> None:
    """`<|im_end|>` may be an ordinary added token that only generation_config.json names."""
    backend = kind()
    end = backend.get_vocab_size()
    state = {str(end): {"content": "<|im_end|>", "special": special}}
    tokenizer = Tokenizer.load(samples.save(backend, tmp_path, added_tokens_decoder=state))
    assert end not in tokenizer.eos_token_ids
    prompt, answer = tokenizer.encode("p"), tokenizer.encode(" hello", add_special_tokens=False)
    # The end's text completes this stop string; a text that ended does not contain it.
    for stop in ((), ("o<|im",)):
        processor = OutputProcessor(tokenizer)
        one = sequence(1, prompt, SamplingParams(stop=stop), scheduled_time=11.0)
        processor.add("r", prompt, one.params, [one], stream=True)
        for token_id in [*answer, end]:
            one.output_token_ids.append(token_id)
            one.token_times.append(12.0)
            one.finish_reason = FinishReason.STOP if token_id == end else None
            assert not processor.check_stop(one)
            if one.finish_reason is None:
                processor.stream(one)
        output = processor.finished(one)
        text = output.completions[0].text
        assert text.strip() == "hello" and output.completions[0].token_ids == [*answer, end]
        assert "".join(delta.text for delta in processor.take_deltas()) == text
