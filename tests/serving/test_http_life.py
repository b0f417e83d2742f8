"""States of the server, silent and failing streams, and metrics for dashboards."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from fake_server import MODEL, FakeServer, served_model, serving

from sps2_mega.errors import ConfigError
from sps2_mega.serving.http.server import bind, url_of
from sps2_mega.serving.http.settings import ServerConfig, model_name
from sps2_mega.text.tokenizer import Tokenizer

LONG = {"model": MODEL, "prompt": "a", "max_tokens": 90_000, "stream": True}


def slow_engine(tokenizer: Tokenizer | None, step_s: float = 0.01) -> FakeEngine:
    return FakeEngine(tokenizer, max_model_len=100_000, step_s=step_s)


def events(lines: Iterator[str]) -> list[str]:
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def in_background(function) -> tuple[threading.Thread, list]:
    got: list = []
    thread = threading.Thread(target=lambda: got.append(function()))
    thread.start()
    return thread, got


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stream(server: FakeServer, **fields: object) -> list[str]:
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | fields, timeout=30) as r:
        assert r.status_code == 200
        return events(r.iter_lines())


def test_loading_then_ready(tokenizer) -> None:
    with serving(FakeEngine(tokenizer), ready=False) as server:
        assert server.get("/health").json() == {"status": "ok", "state": "loading"}
        for answer in (
            server.get("/ready"),
            server.get("/v1/models"),
            server.post("/v1/completions", json={"prompt": "a"}),
            server.post("/tokenize", json={"prompt": "a"}),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["error"]["type"] == "service_unavailable"
        server.http.call_soon(server.async_engine.ready, served_model(server.engine))
        wait_until(lambda: server.get("/ready").status_code == 200)
        assert server.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_drain_finishes_what_runs_and_takes_nothing_new(tokenizer) -> None:
    engine = slow_engine(tokenizer)
    with serving(engine) as server:
        thread, got = in_background(lambda: stream(server, max_tokens=60))
        wait_until(engine.has_work)
        assert server.async_engine.drain_soon(20.0)
        wait_until(lambda: server.get("/ready").status_code == 503)
        refused = server.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert server.get("/health").json()["state"] == "draining"
        thread.join(20)
        server.engine_thread.join(10)
        assert not server.engine_thread.is_alive()
    text = "".join(json.loads(e)["choices"][0]["text"] for e in got[0][:-1])
    assert (text, got[0][-1]) == ("a" * 60, "[DONE]")


def test_an_idle_server_drains_at_once(tokenizer) -> None:
    with serving(FakeEngine(tokenizer)) as server:
        wait_until(lambda: server.get("/ready").status_code == 200)
        assert server.async_engine.drain_soon(20.0)
        server.engine_thread.join(5)
        assert not server.engine_thread.is_alive()


def test_a_drain_ends_after_its_time(tokenizer) -> None:
    with serving(slow_engine(tokenizer)) as server:
        thread, got = in_background(lambda: stream(server))
        wait_until(server.engine.has_work)
        began = time.monotonic()
        server.async_engine.drain_soon(0.3)
        server.engine_thread.join(10)
        thread.join(10)
        assert time.monotonic() - began < 5
    assert got[0][-1] == "[DONE]"
    assert "shutting down" in json.loads(got[0][-2])["error"]["message"]


def test_failure_reaches_streams_and_waiting_clients(tokenizer) -> None:
    with serving(slow_engine(tokenizer)) as server:
        thread, got = in_background(lambda: stream(server))
        plain, answers = in_background(
            lambda: server.post("/v1/completions", json=LONG | {"stream": False})
        )
        wait_until(lambda: server.async_engine.num_open == 2)
        began = time.monotonic()
        server.async_engine.fail_soon("rank 1 (node a, pid 7) died in step 3 (decode)")
        assert time.monotonic() - began < 2
        for one in (thread, plain):
            one.join(10)
        assert answers[0].status_code == 503
        assert "rank 1" in answers[0].json()["error"]["message"]
        assert got[0][-1] == "[DONE]"
        error = json.loads(got[0][-2])["error"]
        assert (error["type"], "died in step 3" in error["message"]) == (
            "service_unavailable",
            True,
        )
        assert server.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="rank 1"):
            server.client().completions.create(model=MODEL, prompt="a")


def test_a_silent_stream_has_comments_and_headers_at_once(tokenizer) -> None:
    engine = slow_engine(tokenizer, step_s=0.7)
    with (
        serving(engine, stream_keep_alive=0.1) as server,
        httpx.stream(
            "POST", f"{server.url}/v1/completions", json=LONG | {"max_tokens": 2}, timeout=30
        ) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        assert engine.output_tokens == 0, "headers must not wait for the first token"
        lines = list(response.iter_lines())
    assert 4 <= lines.count(": keep-alive") <= 20
    assert [json.loads(e)["choices"][0]["text"] for e in events(lines)[:-1]] == ["a", "a"]


def test_a_model_without_tokenizer_takes_and_gives_token_ids() -> None:
    with serving(FakeEngine(None)) as server:
        asked = {"prompt": [5, 6], "max_tokens": 2, "logprobs": 0}
        answer = server.post("/v1/completions", json=asked).json()
        assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:6"] * 2
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/completions", {"prompt": [5], "stop": "x"}),
            ("/v1/completions", {"prompt": [5], "echo": True}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            refused = server.post(path, json=body)
            assert (refused.status_code, "tokenizer" in refused.text) == (400, True)


def test_metric_names_are_frozen(tokenizer) -> None:
    with serving(FakeEngine(tokenizer)) as server:
        for _ in range(3):
            server.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4, "n": 2})
        server.post("/v1/nowhere")
        wait_until(lambda: server.metric("generation_tokens_total") == 24)
        text = server.get("/metrics").text
        assert server.metric("request_success_total") == 6
        assert server.metric("time_to_first_token_seconds_count") == 6
        assert server.metric("inter_token_latency_seconds_count") == 18
        assert server.metric("request_prompt_tokens_sum") == 12
    assert (
        f'sps2:request_success_total{{finished_reason="length",model_name="{MODEL}"}} 6.0' in text
    )
    assert 'path="other",status="404"} 1.0' in text
    assert set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) == METRICS


METRICS = {
    "sps2:admission_rejections_total",
    "sps2:e2e_request_latency_seconds",
    "sps2:generation_tokens_total",
    "sps2:http_requests_total",
    "sps2:inter_token_latency_seconds",
    "sps2:kv_cache_rank_usage_perc",
    "sps2:kv_cache_usage_perc",
    "sps2:num_requests_running",
    "sps2:num_requests_waiting",
    "sps2:prefix_cache_hits_total",
    "sps2:prompt_tokens_total",
    "sps2:request_aborted_total",
    "sps2:request_error_total",
    "sps2:request_generation_tokens",
    "sps2:request_prompt_tokens",
    "sps2:request_queue_time_seconds",
    "sps2:request_success_total",
    "sps2:request_time_per_output_token_seconds",
    "sps2:time_to_first_token_seconds",
}


def test_requests_are_logged_with_their_id_and_unknown_fields_once(tokenizer, caplog) -> None:
    caplog.set_level(logging.INFO, logger="sps2_mega")
    with serving(FakeEngine(tokenizer)) as server:
        for _ in range(2):
            server.post(
                "/v1/completions",
                json={"prompt": "a", "temprature": 0},
                headers={"X-Request-Id": "mine"},
            )
    assert caplog.text.count("'temprature' ignored") == 1
    assert (
        len(re.findall(r"POST /v1/completions 200 in \d+\.\d+ s, request mine", caplog.text)) == 2
    )


def test_answers_do_not_wait_for_the_clients_acknowledgements() -> None:
    """Without TCP_NODELAY an answer's body waits for the delayed acknowledgement of its head."""

    async def nodelay_of_a_connection() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            end = writer.get_extra_info("socket")
            found.set_result(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bind("127.0.0.1", 0)
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            nodelay = await found
            writer.close()
        return nodelay

    assert asyncio.run(nodelay_of_a_connection())


def test_a_taken_port_is_told() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert url_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1 port {port}: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize(
    "fields",
    [dict(port=70_000), dict(request_timeout=0), dict(max_body_bytes=0), dict(drain_timeout=-1)],
)
def test_settings_outside_their_range(fields) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ServerConfig(**fields)


def test_the_model_is_named_after_its_folder() -> None:
    assert model_name(ServerConfig(), "/models/llama-3/") == "llama-3"
    assert model_name(ServerConfig(), "sps2-tiny") == "sps2-tiny"
    assert model_name(ServerConfig(served_model_name="mine"), "x") == "mine"
