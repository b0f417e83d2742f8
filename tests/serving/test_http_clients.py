"""The openai client, as its users call it, against the server with an engine without a model."""

from __future__ import annotations

import threading
import time

import openai
import pytest
from fake_engine import FakeEngine
from fake_server import MODEL, serving


def test_completion(client) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=4)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("cccc", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 4)


def test_every_form_of_prompt(client, tokenizer) -> None:
    ids = [tokenizer.encode(text) for text in ("xa", "yb")]

    def texts(prompt: object, **more: object) -> list[str]:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, **more)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    assert texts(ids[0]) == ["aa"]
    assert texts(["xa", "yb"]) == ["aa", "bb"]
    assert texts(ids) == ["aa", "bb"]
    assert texts(["xa", "yb"], n=2) == ["aa", "aa", "bb", "bb"]
    assert texts(["xa", "yb"], echo=True) == ["xaaa", "ybbb"]
    assert texts([ids[0][1:]], echo=True) == ["xaaa"]


def test_usage_counts_all_prompts_and_samples(client) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "bcd"], n=3, max_tokens=2)
    assert answer.usage.prompt_tokens == 2 + 4
    assert answer.usage.completion_tokens == 2 * 3 * 2


def test_chat(client) -> None:
    answer = client.chat.completions.create(
        model="alias/of-it",
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=0,
    )
    [choice] = answer.choices
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert (choice.message.role, choice.message.content) == ("assistant", ":::")
    assert [entry.token for entry in choice.logprobs.content] == [":", ":", ":"]


@pytest.mark.parametrize("echo", [False, True])
def test_completion_stream_is_the_whole_answer_in_pieces(client, echo) -> None:
    asked = dict(model=MODEL, prompt=["xé", "yb"], n=2, max_tokens=5, echo=echo)
    whole = client.completions.create(**asked)
    texts, reasons, usages = {}, {}, []
    for chunk in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            assert choice.index not in reasons
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1] == whole.usage


def test_chat_stream(client) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ":::"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_logprobs_are_those_of_the_whole_answer(client) -> None:
    asked = dict(model=MODEL, prompt="a", max_tokens=4, logprobs=1)
    whole = client.completions.create(**asked).choices[0].logprobs
    pieces = [c.choices[0].logprobs for c in client.completions.create(**asked, stream=True)]
    assert [o for piece in pieces for o in piece.text_offset] == whole.text_offset == [0, 1, 2, 3]
    assert [t for piece in pieces for t in piece.tokens] == whole.tokens


def test_stop_strings_do_not_show_in_a_stream(client) -> None:
    asked = dict(model=MODEL, prompt="a", max_tokens=9, stop="aaaa")
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models(client) -> None:
    [model] = client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 200)
    assert client.models.retrieve("alias/of-it").id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_tokens_there_and_back(server, tokenizer) -> None:
    found = server.post("/tokenize", json={"prompt": "né"}).json()
    assert found == {"tokens": tokenizer.encode("né"), "count": 4, "max_model_len": 200}
    bare = server.post("/tokenize", json={"prompt": "né", "add_special_tokens": False}).json()
    assert bare["count"] == 3
    assert server.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": "né"}
    messages = [{"role": "user", "content": "hi"}]
    asked = server.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert asked == tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("fields", "error", "status", "said"),
    [
        (dict(model="gpt-9"), openai.NotFoundError, 404, "is not served here"),
        (dict(prompt=[]), openai.BadRequestError, 400, "no tokens"),
        (dict(prompt="x" * 300), openai.APIStatusError, 413, "301 tokens"),
        (dict(prompt=[70_000]), openai.BadRequestError, 400, "outside the vocabulary"),
        (dict(temperature=-1), openai.BadRequestError, 400, "temperature must be in"),
        (dict(max_tokens="many"), openai.BadRequestError, 400, "max_tokens"),
        (dict(logit_bias={"1": 5}), openai.BadRequestError, 400, "logit_bias is not supported"),
        (dict(max_tokens=0), openai.BadRequestError, 400, "only with echo"),
        (dict(echo=True, logprobs=21), openai.BadRequestError, 400, "logprobs must be in [0, 20]"),
        (
            dict(
                echo=True,
                logprobs=20,
                n=16,
                prompt="a" * 150,
                extra_body={"prompt": ["a" * 150] * 42},
            ),
            openai.BadRequestError,
            400,
            "2,130,912 log-probabilities",
        ),
        (dict(n=17), openai.BadRequestError, 400, "17 samples"),
    ],
)
def test_errors_have_the_type_that_the_client_knows(client, fields, error, status, said) -> None:
    asked = {"model": MODEL, "prompt": "a", "max_tokens": 2, **fields}
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client.completions.create(**asked, stream=stream)
        assert caught.value.status_code == status
        assert said in caught.value.body["message"]
        assert caught.value.request_id == caught.value.body["request_id"]


def test_key_is_needed_where_one_is_set(tokenizer) -> None:
    with serving(FakeEngine(tokenizer), api_key="secret") as running:
        for key in ("wrong", "secret "):
            with pytest.raises((openai.AuthenticationError, openai.APIConnectionError)):
                running.client(api_key=key).models.list()
        assert running.client(api_key="secret").models.list().data
        assert running.post("/tokenize", json={"prompt": "a"}).status_code == 401
        assert [running.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [
            200
        ] * 3


def test_full_queue_is_told_and_the_client_comes_back(tokenizer) -> None:
    with serving(FakeEngine(tokenizer, step_s=0.05), max_samples=2) as running:
        first = running.client().completions.create(
            model=MODEL, prompt="a", n=2, max_tokens=30, stream=True
        )
        with pytest.raises(openai.RateLimitError) as caught:
            running.client().completions.create(model=MODEL, prompt="b")
        assert caught.value.response.headers["retry-after"] == "1"
        assert running.metric("admission_rejections_total") == 1
        patient = running.client(max_retries=6)
        assert patient.completions.create(model=MODEL, prompt="b", max_tokens=1).choices
        assert len(list(first)) == 60


def test_whoever_leaves_frees_the_engine(tokenizer) -> None:
    engine = FakeEngine(tokenizer, max_model_len=100_000, step_s=0.01)
    with serving(engine) as running:

        def wait_idle() -> None:
            deadline = time.monotonic() + 10
            while engine.has_work() or running.async_engine.num_open:
                assert time.monotonic() < deadline
                time.sleep(0.01)

        asked = dict(model=MODEL, prompt="a", max_tokens=90_000)
        stream = running.client().completions.create(**asked, stream=True)
        next(iter(stream))
        stream.close()
        wait_idle()
        with pytest.raises(openai.APITimeoutError):
            running.client(timeout=0.3).completions.create(**asked)
        wait_idle()
        assert running.metric("request_aborted_total") == 2


def test_request_timeout_ends_with_504_and_an_event(tokenizer) -> None:
    engine = FakeEngine(tokenizer, max_model_len=100_000, step_s=0.01)
    with serving(engine, request_timeout=0.4) as running:
        asked = dict(model=MODEL, prompt="a", max_tokens=90_000)
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError, match=r"0\.4 s"):
            running.client(max_retries=2).completions.create(**asked)
        assert time.monotonic() - began < 5, "the client must not try again"
        with pytest.raises(openai.APIError, match=r"0\.4 s"):
            list(running.client().completions.create(**asked, stream=True))


def test_many_clients_get_their_own_answers(server) -> None:
    wrong: list[str] = []

    def ask(letter: str) -> None:
        one = server.client(max_retries=20)
        for stream in (False, True):
            answer = one.completions.create(
                model=MODEL, prompt=letter, max_tokens=20, stream=stream
            )
            text = "".join(c.choices[0].text for c in (answer if stream else [answer]))
            if text != letter * 20:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(chr(97 + i),)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert server.async_engine.num_open == 0
