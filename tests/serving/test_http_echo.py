"""Echoed prompts with the log-probabilities of their tokens, as requested to score texts."""

from __future__ import annotations

import pytest
import tokenizer_samples as samples
from fake_server import MODEL

from sps2_mega.serving.echo import echo_of
from sps2_mega.text.tokenizer import Tokenizer


def test_lists_go_over_prompt_and_output(client) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="xy", echo=True, logprobs=2, max_tokens=3
    )
    (choice,) = answer.choices
    assert choice.text == "xyyyy"
    lists = choice.logprobs
    assert lists.tokens == ["<s>", "x", "y", "y", "y", "y"]
    assert lists.token_logprobs == [None, -0.25, -0.5, -0.5, -0.5, -0.5]
    assert lists.top_logprobs[0] is None
    assert [list(top.values()) for top in lists.top_logprobs[1:3]] == [[0.0, -0.5]] * 2
    assert lists.text_offset == [0, 0, 1, 2, 3, 4]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 3)


def test_prompts_alone_in_every_form(client, tokenizer) -> None:
    ids = [tokenizer.encode(text) for text in ("x", "yb")]
    for prompt in ("yb", ids[1], ["x", "yb"], ids):
        answer = client.completions.create(
            model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=0, n=2
        )
        count = 4 if prompt in (ids, ["x", "yb"]) else 2
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        # Echoed ids show special tokens by name; echoed text is unchanged.
        given = "<s>" if prompt in (ids, ids[1]) else ""
        assert [choice.text for choice in answer.choices[-2:]] == [f"{given}yb"] * 2
        last = answer.choices[-1].logprobs
        assert (last.tokens, last.token_logprobs) == (["<s>", "y", "b"], [None, -0.25, -0.5])
        assert last.text_offset == [0, len(given), len(given) + 1]
        assert answer.usage.completion_tokens == 0


def test_a_prompt_of_one_token_has_no_log_probability(client) -> None:
    for max_tokens, new in ((0, []), (1, [-0.5])):
        answer = client.completions.create(
            model=MODEL, prompt=[[120]], echo=True, logprobs=0, max_tokens=max_tokens
        )
        lists = answer.choices[0].logprobs
        assert lists.token_logprobs == [None, *new]
        assert lists.top_logprobs == [None] + [{}] * len(new)
        assert lists.text_offset == list(range(1 + len(new)))


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_stream_is_the_whole_answer_in_pieces(client, max_tokens) -> None:
    """Other samples may have tokens before the prompt's logprobs, which the first sample brings."""
    asked = dict(
        model=MODEL, prompt=["xé", "yb"], n=2, max_tokens=max_tokens, echo=True, logprobs=1
    )
    whole = client.completions.create(**asked)
    texts: dict[int, str] = {}
    lists: dict[int, dict[str, list]] = {}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            new = choice.logprobs.model_dump()
            if choice.index not in texts:
                assert new["token_logprobs"][0] is None, "the prompt comes first"
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            seen = lists.setdefault(choice.index, {name: [] for name in new})
            for name, values in new.items():
                seen[name] += values
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert lists == {choice.index: choice.logprobs.model_dump() for choice in whole.choices}


def test_a_large_answer_is_made_beside_the_others(client) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["ab" * 90] * 4, n=4, max_tokens=1, echo=True, logprobs=20
    )
    assert len(answer.choices) == 16
    for choice in answer.choices:
        assert len(choice.text) == len(choice.logprobs.tokens[1:]) == 181
        assert choice.logprobs.token_logprobs[-2] == -0.25 * 180


def test_scoring_as_evaluation_harnesses_ask_for_it(client) -> None:
    """Score continuations from prompt logprobs, as evaluation harnesses do.

    They send batches of context and continuation as ids, discard one new token, and compare a
    token's log-probability with the largest at its position.
    """
    answer = client.completions.create(
        model=MODEL,
        prompt=[[120, 121, 122], [120, 7]],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    found = []
    for choice, context in zip(sorted(answer.choices, key=lambda c: c.index), (1, 1), strict=True):
        scored = choice.logprobs.token_logprobs[context:-1]
        best = [max(top.values()) for top in choice.logprobs.top_logprobs[context:-1]]
        found.append((sum(scored), scored == best))
    assert found == [(-0.75, False), (-0.25, False)]


@pytest.mark.parametrize("make", [samples.byte_level, samples.byte_bpe, samples.sentencepiece])
def test_offsets_point_at_the_tokens(make, tmp_path) -> None:
    tokenizer = Tokenizer.load(samples.save(make(), tmp_path))
    for text in ("the a word", "née </s> naïve 漢字 \n", " x"):
        ids = tokenizer.encode(text)
        for prompt in (text, ids):
            echo = echo_of(prompt, ids, tokenizer)
            offsets = echo._offsets()
            assert len(offsets) == len(ids)
            assert offsets == sorted(offsets) and offsets[-1] <= len(echo.text)
            ends = [*offsets[1:], len(echo.text)]
            for token_id, start, end in zip(ids, offsets, ends, strict=True):
                raw = tokenizer.token_bytes(token_id)
                if raw.isascii() and end > start:
                    assert echo.text[start:end].strip() == raw.decode().strip()
        assert echo.output_offsets().of_next(ids[0]) == len(echo.text)
