from __future__ import annotations

import pytest

from sps2_mega.errors import RequestError
from sps2_mega.serving.protocol import UNSUPPORTED, parse_request

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_all_sampling_fields_arrive() -> None:
    body = {
        "prompt": "x",
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "seed": -5,
        "n": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 3,
        "repetition_penalty": 1.5,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logprobs": 4,
    }
    params = parse_request(body, kind="completion").params
    for name in body.keys() - {"prompt", "stop", "stop_token_ids"}:
        assert getattr(params, name) == body[name]
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("", ""), ("a", "a"), ([1, 2], [1, 2]), (["a"], "a"), ([[3]], [3]), ([], [])],
)
def test_prompt_spellings(prompt, expected) -> None:
    assert parse_request({"prompt": prompt}).prompt == expected


def test_defaults_go_below_the_body_and_above_openais() -> None:
    assert parse_request({"prompt": "x"}).params.max_tokens == 16
    assert parse_request(CHAT).params.max_tokens is None
    defaults = {"max_tokens": 5, "temperature": 0.0, "stop": ("z",)}
    for body in ({"prompt": "x"}, CHAT):
        params = parse_request(body, defaults=defaults).params
        assert (params.max_tokens, params.temperature, params.stop) == (5, 0.0, ("z",))
        params = parse_request(body | {"max_tokens": 9, "stop": "y"}, defaults=defaults).params
        assert (params.max_tokens, params.stop) == (9, ("y",))
    assert (
        parse_request(CHAT | {"max_completion_tokens": 3, "max_tokens": 9}).params.max_tokens == 3
    )


def test_null_means_not_given() -> None:
    parsed = parse_request({"prompt": "x", "messages": None, "temperature": None, "tools": None})
    assert parsed.params.temperature == 1.0
    assert parsed.warnings == ()


def test_messages_become_plain_text() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None},
    ]
    assert parse_request({"messages": messages}).messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("completion", {"logprobs": 0}, 0),
        ("completion", {"logprobs": 5}, 5),
        ("completion", {}, None),
        ("chat", {"logprobs": True}, 0),
        ("chat", {"logprobs": True, "top_logprobs": 3}, 3),
        ("chat", {"logprobs": False}, None),
        (None, {"logprobs": True}, 0),
        (None, {"logprobs": True, "top_logprobs": 2}, 2),
        (None, {"logprobs": 2}, 2),
    ],
)
def test_logprobs_spellings(kind, fields, expected) -> None:
    body = CHAT if kind == "chat" else {"prompt": "x"}
    assert parse_request(body | fields, kind=kind).params.logprobs == expected


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("completion", {"logprobs": True}),
        ("chat", {"logprobs": 3}),
        ("chat", {"top_logprobs": 3}),
        ("completion", {"logprobs": 21}),
    ],
)
def test_wrong_logprobs_are_named(kind, fields) -> None:
    body = CHAT if kind == "chat" else {"prompt": "x"}
    with pytest.raises(RequestError, match="logprobs"):
        parse_request(body | fields, kind=kind)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_meaningful_unsupported_fields_are_refused_by_name(name) -> None:
    with pytest.raises(RequestError, match=name):
        parse_request({"prompt": "x", name: {"something": 1}})
    for nothing in UNSUPPORTED[name]:
        assert parse_request({"prompt": "x", name: nothing}).warnings == ()


def test_best_of_must_equal_n() -> None:
    assert parse_request({"prompt": "x", "best_of": 1}).params.n == 1
    assert parse_request({"prompt": "x", "best_of": 3, "n": 3}).params.n == 3
    with pytest.raises(RequestError, match="best_of"):
        parse_request({"prompt": "x", "best_of": 2})


def test_unknown_fields_are_reported_and_harmless_ones_are_not() -> None:
    parsed = parse_request({"prompt": "x", "user": "me", "metadata": {}, "temprature": 0})
    assert parsed.warnings == ("unknown field 'temprature' ignored",)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "prompt or messages"),
        ({"prompt": "x", "messages": []}, "both"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0: content is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool calls"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0",
        ),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", "b"]}, "2 prompts"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens: .*'many'"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "stop": 3}, "stop"),
        ({"prompt": "x", "n": 0}, "n must"),
    ],
)
def test_mistakes_are_named(body, named) -> None:
    with pytest.raises(RequestError, match=named):
        parse_request(body)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request({"prompt": {"x": "y" * 5000}})
    assert len(str(caught.value)) < 600
