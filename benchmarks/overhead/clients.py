"""Clients that keep a server busy with known requests and wait for whole answers or stream them."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import httpx

from benchmarks.generation.workload import source_prompts
from benchmarks.load.process import RunningServer
from benchmarks.load.sse import events


def mixed_requests(
    count: int, shortest: int, longest: int, new_tokens: int
) -> list[tuple[str, int]]:
    """Prompts with numbers of new tokens from half to one and a half times `new_tokens`, unordered.

    Answers of one length would all end in the same step, and then everybody waits for the clients.
    """
    texts = source_prompts(count, shortest, longest)
    asks = [
        (texts[i % len(texts)], max(1, new_tokens * (i + count // 2) // count))
        for i in range(count)
    ]
    random.Random(0).shuffle(asks)
    return asks


async def answered(
    server: RunningServer, asks: list[tuple[str, int]], at_once: int, *, stream: bool
) -> float:
    """Seconds until all requests are answered.

    Raises:
        RuntimeError: an answer has another number of tokens than was asked for.
    """
    waiting = iter(asks)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, trust_env=False) as client:

        async def work() -> None:
            for text, new_tokens in waiting:  # all workers take from the same iterator
                body = {
                    "model": server.model,
                    "prompt": text,
                    "max_tokens": new_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": stream,
                }
                tokens = await (_streamed if stream else _whole)(client, body)
                if tokens != new_tokens:
                    raise RuntimeError(f"{tokens} tokens came instead of {new_tokens}")

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(at_once)))
        return time.perf_counter() - began


async def _whole(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


async def _streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    usage: dict[str, Any] = {}
    wanted = body | {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=wanted) as response:
        response.raise_for_status()
        async for event in events(response):
            usage = event.get("usage") or usage
    return int(usage["completion_tokens"])
