"""Client of the OpenAI API that sends one request and notes the time of each token.

A token is a server-sent event with text (or log-probabilities); the true number of tokens is the
server's `usage`. Failures are named by kind and never raised. Times are of `time.monotonic()`.
Decides nothing about when to send.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from benchmarks.load.requests import TimedRequest
from benchmarks.load.sse import StreamError, error_code, events

Api = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Server, model and options of requests.

    `extra` are fields for every body, such as `ignore_eos` if the server knows it.
    """

    url: str
    model: str
    api_key: str = "none"
    api: Api = "completions"
    timeout_s: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        path = "chat/completions" if self.api == "chat" else "completions"
        return f"{base_of(self.url)}/{path}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    def body(self, request: TimedRequest) -> dict[str, Any]:
        """Body of the request, without fields that `extra` sets to null."""
        what: dict[str, Any] = {"prompt": request.prompt}
        if self.api == "chat":
            what = {"messages": [{"role": "user", "content": request.prompt}]}
        fields = {
            "model": self.model,
            **what,
            "max_tokens": request.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(slots=True, kw_only=True)
class Record:
    """Outcome of one request.

    `due` is when it should have been sent, `sent` when it was; without `error` it was answered to
    its end. Counts are the server's, None if it does not report them.
    """

    request: TimedRequest
    due: float
    sent: float
    end: float = 0.0
    token_times: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens, by the server's count if there is one."""
        return len(self.token_times) if self.output_tokens is None else self.output_tokens


def base_of(url: str) -> str:
    """Address of the API's root, whether or not `url` ends with /v1."""
    trimmed = url.rstrip("/")
    return trimmed if trimmed.endswith("/v1") else f"{trimmed}/v1"


def open_client(timeout_s: float) -> httpx.AsyncClient:
    """HTTP client without a limit on its connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    # The sender limits the time of a whole request.
    return httpx.AsyncClient(
        limits=limits, timeout=httpx.Timeout(timeout_s, pool=None), trust_env=False
    )


async def ask(
    client: httpx.AsyncClient, target: Target, request: TimedRequest, due: float
) -> Record:
    """Send the request now and follow the stream to its end."""
    record = Record(request=request, due=due, sent=time.monotonic())
    await fill(client, target, record)
    return record


async def fill(client: httpx.AsyncClient, target: Target, record: Record) -> None:
    """Send the record's request and note its events; cancelling closes the connection."""
    request = record.request
    try:
        async with client.stream(
            "POST", target.endpoint, json=target.body(request), headers=target.headers
        ) as response:
            if response.status_code != 200:
                record.error = _refusal(response.status_code, await response.aread())
            else:
                await _follow(response, record)
    except httpx.TimeoutException as error:
        record.error = f"timeout: {type(error).__name__}"
    except httpx.HTTPError as error:
        record.error = f"connection: {type(error).__name__}"
    record.end = time.monotonic()


async def _follow(response: httpx.Response, record: Record) -> None:
    try:
        async for event in events(response):
            _take(event, record, time.monotonic())
    except StreamError as error:
        record.error = f"stream: {error}"


def _take(event: dict[str, Any], record: Record, now: float) -> None:
    for choice in event.get("choices", ()):
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if text or choice.get("logprobs"):
            record.token_times.append(now)
            record.text.append(text)
    usage = event.get("usage")
    if usage:
        record.prompt_tokens = usage.get("prompt_tokens")
        record.output_tokens = usage.get("completion_tokens")
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"http {status}: {error_code(json.loads(body))}"
    except ValueError:
        return f"http {status}"
