"""Bad input (schema tests, fuzzed and oversized bodies) gives no 5xx and leaves nothing behind."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tokenizer_samples as samples
from fake_engine import FakeEngine
from fake_server import MODEL, FakeServer, serving

from sps2_mega.text.tokenizer import Tokenizer

MAX_BODY = 20_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    folder = samples.save(samples.byte_level(), tmp_path_factory.mktemp("tokenizer"))
    with serving(
        FakeEngine(Tokenizer.load(folder), max_model_len=100), max_body_bytes=MAX_BODY
    ) as running:
        yield running


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(server) -> None:
    """Schemathesis as a user runs it, on the schema that the server publishes."""
    result = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{server.url}/openapi.json", "--checks", "not_a_server_error"),
            *("--max-examples", "20", "--seed", "5", "--phases", "examples,coverage,fuzzing"),
            *("--generation-database", "none", "--no-color"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "11 selected" in " ".join(result.stdout.split()), result.stdout


GOOD = {
    "/v1/completions": {"model": MODEL, "prompt": "abc", "max_tokens": 2, "stop": ["x"]},
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
    },
    "/tokenize": {"prompt": "abc"},
    "/detokenize": {"tokens": [97]},
}
ODD = [
    None, True, -1, 2**63, 2**70, 10**400, 1e308, float("nan"), float("inf"), "", "\ud800", "\x00",
    [], {}, [[]], [None], [[1], "a"], {"a": {}}, [-1], [2**70], "x" * 5000, [{"role": "user"}],
    [{"role": "tool", "content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}],
]  # fmt: skip
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
    "n", "stop", "stop_token_ids", "min_tokens", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logprobs", "top_logprobs", "stream", "stream_options", "echo", "tools",
    "response_format", "best_of", "tokens", "add_special_tokens", "ignore_eos",
]  # fmt: skip


def malformed(chooser: random.Random) -> tuple[str, bytes]:
    """A path and a body that is cut, damaged, no object, or has odd values in its fields."""
    path = chooser.choice(list(GOOD))
    body = dict(GOOD[path])
    kind = chooser.randrange(6)
    if kind < 3:
        for name in chooser.sample(FIELDS, chooser.randint(1, 3)):
            body[name] = chooser.choice(ODD)
        return path, json.dumps(body).encode()
    text = json.dumps(body).encode()
    if kind == 3:
        return path, text[: chooser.randrange(len(text))]
    if kind == 4:
        damaged = bytearray(text)
        damaged[chooser.randrange(len(damaged))] = chooser.randrange(256)
        return path, bytes(damaged)
    return path, chooser.choice(
        [b"", b"null", b"[]", b"3", b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe", b"9" * 5000]
    )


@pytest.mark.slow
def test_a_thousand_malformed_bodies_leave_no_trace(server) -> None:
    chooser = random.Random(5)
    rejected = 0
    with httpx.Client(base_url=server.url, timeout=30) as client:
        while rejected < 1000:
            path, body = malformed(chooser)
            response = client.post(path, content=body, headers={"content-type": "application/json"})
            assert response.status_code < 500, (path, body[:300], response.text)
            if response.status_code >= 400:  # the others happened to be good
                rejected += 1
                error = response.json()["error"]
                assert error["message"] and error["type"] and len(error["message"]) < 2000
                assert error["request_id"] == response.headers["x-request-id"]
        answer = client.post("/v1/completions", json=GOOD["/v1/completions"]).json()
    assert answer["choices"][0]["text"] == "cc"
    assert server.async_engine.num_open == 0
    assert not server.engine.has_work()


def test_validation_names_the_field(server) -> None:
    wrong = server.post("/v1/completions", json={"prompt": "a", "max_tokens": "x"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")
    missing = server.post("/v1/completions", json={})
    assert missing.json()["error"]["message"] == "prompt: prompt is missing"
    native = server.post("/detokenize", json={"tokens": ["a"]})
    assert (native.status_code, native.json()["error"]["type"]) == (422, "invalid_request_error")
    not_json = server.post(
        "/v1/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert "not JSON" in not_json.json()["error"]["message"]
    for text in ("\ud800", "a\udfffb"):
        half = server.post(
            "/v1/completions",
            content=json.dumps({"prompt": text}).encode(),
            headers={"content-type": "application/json"},
        )
        assert (half.status_code, "surrogates" in half.text) == (400, True)


def test_large_bodies_are_refused_with_and_without_a_length(server) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(MAX_BODY // 1000 + 2):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    for content in (b" " * (MAX_BODY + 1), pieces()):
        response = server.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 413
        assert f"larger than {MAX_BODY} bytes" in response.json()["error"]["message"]


def test_unknown_paths_and_methods_have_the_envelope(server) -> None:
    nowhere, wrong = server.get("/v1/nowhere"), server.get("/v1/completions")
    assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "not_found_error")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"]


def test_a_request_id_is_kept_where_it_is_printable(server) -> None:
    def answered(given: str | bytes) -> str:
        return server.get("/version", headers={"X-Request-Id": given}).headers["x-request-id"]

    assert answered("client-7") == "client-7"
    assert answered("x" * 129) != "x" * 129
    assert len(answered("with space")) == 32
    assert len(answered("é".encode())) == 32
