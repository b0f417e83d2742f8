from __future__ import annotations

import pytest
import tokenizer_samples as samples
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_mega.logprobs import TokenLogprob
from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.text.output_processor import OutputProcessor
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import FinishReason, SamplingParams, Sequence


@pytest.fixture(scope="module", params=["byte_level", "byte_bpe", "sentencepiece"])
def tokenizer(request, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    backend = getattr(samples, request.param)()
    return Tokenizer.load(samples.save(backend, tmp_path_factory.mktemp("tokenizer")))


def run(
    tokenizer: Tokenizer | None, token_ids: list[int], params: SamplingParams
) -> tuple[list[OutputDelta], RequestOutput]:
    """A streamed request of one sample that ends by a stop string or after the last token."""
    prompt = [1]
    one = Sequence(
        seq_id=3, prompt_token_ids=prompt, params=params, seed=0, max_tokens=99, arrival_time=0.0
    )
    processor = OutputProcessor(tokenizer)
    processor.add("r", prompt, params, [one], stream=True)
    deltas: list[OutputDelta] = []
    for token_id in token_ids:
        one.output_token_ids.append(token_id)
        one.token_times.append(float(len(one.token_times)))
        one.logprobs.append(TokenLogprob(token_id, -0.5))
        if processor.check_stop(one):
            one.finish_reason = FinishReason.STOP
            break
        if len(one.output_token_ids) == len(token_ids):
            one.finish_reason = FinishReason.LENGTH
            break
        processor.stream(one)
        deltas += processor.take_deltas()
    output = processor.finished(one)
    assert output is not None
    return deltas + processor.take_deltas(), output


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_deltas_together_are_the_completion(tokenizer, data) -> None:
    text = data.draw(st.text(alphabet="aab; é😀\n", min_size=1, max_size=30))
    stops = tuple(
        data.draw(st.lists(st.text(alphabet="aab; é", min_size=1, max_size=4), max_size=3))
    )
    params = SamplingParams(
        max_tokens=99,
        stop=stops,
        logprobs=0,
        include_stop_str_in_output=data.draw(st.booleans()),
        min_tokens=data.draw(st.integers(0, 9)),
    )
    deltas, output = run(tokenizer, tokenizer.encode(text, add_special_tokens=False), params)
    [completion] = output.completions
    assert "".join(delta.text for delta in deltas) == completion.text
    assert [t for delta in deltas for t in delta.token_ids] == completion.token_ids
    assert [entry for delta in deltas for entry in delta.logprobs or []] == completion.logprobs
    reasons = [delta.finish_reason for delta in deltas]
    assert reasons == [None] * (len(deltas) - 1) + [completion.finish_reason]


def test_text_that_may_become_a_stop_string_is_held_back(tmp_path) -> None:
    tokenizer = Tokenizer.load(samples.save(samples.byte_level(), tmp_path))
    ids = tokenizer.encode("x; en y", add_special_tokens=False)
    deltas, _ = run(tokenizer, ids, SamplingParams(max_tokens=99, stop=("; end",)))
    assert [delta.text for delta in deltas] == ["x", "", "", "", "", "; en ", "y"]


def test_half_a_character_is_never_shown(tmp_path) -> None:
    tokenizer = Tokenizer.load(samples.save(samples.byte_level(), tmp_path))
    ids = tokenizer.encode("é😀!", add_special_tokens=False)
    deltas, _ = run(tokenizer, ids, SamplingParams(max_tokens=99))
    assert [delta.text for delta in deltas] == ["", "é", "", "", "", "😀", "!"]


def test_without_a_tokenizer_only_tokens_stream() -> None:
    deltas, output = run(None, [5, 6], SamplingParams(max_tokens=99))
    assert [(delta.text, delta.token_ids) for delta in deltas] == [("", [5]), ("", [6])]
    assert output.completions[0].token_ids == [5, 6]


def test_dropped_and_unstreamed_requests_leave_no_deltas(tmp_path) -> None:
    tokenizer = Tokenizer.load(samples.save(samples.byte_level(), tmp_path))
    processor = OutputProcessor(tokenizer)
    params = SamplingParams()
    ones = [
        Sequence(
            seq_id=i, prompt_token_ids=[1], params=params, seed=0, max_tokens=9, arrival_time=0.0
        )
        for i in range(2)
    ]
    processor.add("plain", [1], params, ones[:1])
    processor.add("left", [1], params, ones[1:], stream=True)
    processor.drop("left")
    for one in ones:
        one.output_token_ids.append(65)
        processor.stream(one)
    assert processor.take_deltas() == []
