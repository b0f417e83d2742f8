"""Client of a soak: sends cases with bounded concurrency and reports the faults of each answer.

Every text must equal the known one to the last character, with the right number of tokens; a client
that leaves must have seen the beginning of it; an invalid request must be refused in the API's
form. Nothing is raised: faults are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.load.sse import StreamError, events
from benchmarks.soaking.cases import Case

_PATH = "/v1/completions"


@dataclass(slots=True, kw_only=True)
class SoakResult:
    """Outcome of a soak; `faults` are texts, `endings` counts what the clients did.

    Only the first faults are kept in full.
    """

    done: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    faults: list[str] = field(default_factory=list)


async def soak(
    url: str,
    cases: Sequence[Case],
    *,
    at_once: int,
    timeout_s: float = 300.0,
    on_done: Callable[[int], None] | None = None,
) -> SoakResult:
    """Run all cases against the server at `url` (without /v1).

    `on_done` is called with the number of ended cases.
    """
    result = SoakResult()
    waiting = iter(cases)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(
        base_url=url, timeout=timeout_s, limits=limits, trust_env=False
    ) as client:

        async def work() -> None:
            for case in waiting:  # all workers take from the same iterator
                found = await _faults(client, case)
                result.faults += [f"{case.ending}, {case.shape}: {fault}" for fault in found]
                result.done += 1
                result.endings[case.ending] += 1
                result.shapes[case.shape] += 1
                result.tokens += case.num_tokens or 0
                if on_done is not None:
                    on_done(result.done)

        await asyncio.gather(*(work() for _ in range(at_once)))
    return result


async def _faults(client: httpx.AsyncClient, case: Case) -> list[str]:
    try:
        if case.ending == "refused":
            return list(_refusal_faults(case, await _post(client, case)))
        if case.ending == "left":
            return await _leave(client, case)
        if case.stream:
            return await _stream(client, case)
        response = await _post(client, case)
        if response.status_code != 200:
            return [f"status {response.status_code}: {response.text[:300]}"]
        body = response.json()
        return list(
            _answer_faults(case, [choice["text"] for choice in body["choices"]], body["usage"])
        )
    except (httpx.HTTPError, StreamError, ValueError, KeyError, IndexError) as error:
        return [f"{type(error).__name__}: {error}"]


async def _post(client: httpx.AsyncClient, case: Case) -> httpx.Response:
    return await client.post(_PATH, content=case.body, headers={"Content-Type": "application/json"})


async def _stream(client: httpx.AsyncClient, case: Case) -> list[str]:
    texts = [""] * len(case.texts)
    ends: Counter[int] = Counter()
    usage: dict[str, Any] = {}
    async with _open_stream(client, case) as response:
        if response.status_code != 200:
            return [f"status {response.status_code}: {(await response.aread())[:300]!r}"]
        async for event in events(response):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
                ends[choice["index"]] += choice["finish_reason"] is not None
    faults = list(_answer_faults(case, texts, usage))
    if ends != Counter(range(len(texts))):
        faults.append(f"choices ended {dict(ends)} times")
    return faults


async def _leave(client: httpx.AsyncClient, case: Case) -> list[str]:
    """Close the connection midway."""
    if not case.stream:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(case.leave_after):
                response = await _post(client, case)
                if response.status_code != 200:
                    return [f"status {response.status_code}: {response.text[:300]}"]
        return []
    seen, count = "", 0
    async with _open_stream(client, case) as response:
        if response.status_code != 200:
            return [f"status {response.status_code}: {(await response.aread())[:300]!r}"]
        if case.leave_after:
            async for event in events(response):
                seen += event["choices"][0]["text"]
                count += 1
                if count >= case.leave_after:
                    break
    # Half a character at the known answer's end is a whole one in a longer answer.
    whole = case.texts[0].rstrip("\ufffd")
    if seen[: len(whole)] != whole[: len(seen)]:
        return [f"began with {seen[:200]!r} and not with {whole[:200]!r}"]
    return []


def _open_stream(client: httpx.AsyncClient, case: Case) -> Any:
    return client.stream(
        "POST", _PATH, content=case.body, headers={"Content-Type": "application/json"}
    )


def _answer_faults(case: Case, texts: list[str], usage: dict[str, Any]) -> Iterator[str]:
    if len(texts) != len(case.texts):
        yield f"{len(texts)} choices instead of {len(case.texts)}"
    for index, (text, known) in enumerate(zip(texts, case.texts, strict=False)):
        if text != known:
            sent = case.body[:300]
            yield f"choice {index} is {text[:200]!r} and not {known[:200]!r}; sent {sent!r}"
    if case.num_tokens is not None and usage.get("completion_tokens") != case.num_tokens:
        yield f"usage says {usage.get('completion_tokens')} tokens instead of {case.num_tokens}"


def _refusal_faults(case: Case, response: httpx.Response) -> Iterator[str]:
    if response.status_code != case.status:
        yield f"status {response.status_code} instead of {case.status} for {case.body[:100]!r}"
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = None
    if not message:
        yield f"no error message in {response.text[:200]!r}"
