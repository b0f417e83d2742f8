"""Time between tokens of steady decodes on one server while long prompts arrive in turn.

    decodes   ....................................................   gaps between tokens, each
    long              |== prefill ==|        |== prefill ==|         due .. first token
    gaps      quiet   |   disturbed |  quiet |  disturbed  |  quiet

A gap is disturbed if it overlaps a prefill, else quiet. Quiet gaps lie before, between and after
the prefills, so that decodes whose context grows are compared with themselves. Decides nothing
about servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from benchmarks.load.client import Record, Target, fill, open_client
from benchmarks.load.requests import TimedRequest

_CODES = range(32, 127)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Load that is the same for all servers.

    `decodes` requests have prompts of `decode_prompt` tokens, and `prompts` long ones have
    `prompt_len` tokens, with `pause_s` of quiet before each and after the last one.
    """

    decodes: int
    decode_prompt: int
    prompts: int
    prompt_len: int
    pause_s: float
    output_len: int  # of decodes, at most: they are abandoned at the end
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """Times in seconds from the start: (due, first token) of prefills, (begin, end) of gaps."""

    prefills: list[tuple[float, float]]
    gaps: list[tuple[float, float]]

    def parted(self) -> tuple[list[float], list[float]]:
        """Lengths of quiet and of disturbed gaps."""
        quiet: list[float] = []
        disturbed: list[float] = []
        for begin, end in self.gaps:
            during = any(begin < over and end > due for due, over in self.prefills)
            (disturbed if during else quiet).append(end - begin)
        return quiet, disturbed


async def watch(target: Target, trace: Trace) -> Watched:
    """Run the trace against the server.

    Raises:
        RuntimeError: a request failed, or decodes ended before the last prefill did.
    """
    texts = random.Random(0)
    start = time.monotonic()
    async with open_client(trace.timeout_s) as client:
        # One-time costs of the first request of each kind must not count.
        await _first_token(client, target, _request(texts, trace.prompt_len, 1), trace)
        decodes = [
            _record(_request(texts, trace.decode_prompt, trace.output_len))
            for _ in range(trace.decodes)
        ]
        tasks = [asyncio.create_task(fill(client, target, record)) for record in decodes]
        try:
            await _until_running(decodes, trace.timeout_s)
            settled = time.monotonic()
            prefills = []
            for _ in range(trace.prompts):
                await asyncio.sleep(trace.pause_s)
                long = _request(texts, trace.prompt_len, 1)
                prefills.append(await _first_token(client, target, long, trace))
            await asyncio.sleep(trace.pause_s)
            ended = [record.error or "ended" for record in decodes if record.end]
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
    if ended:
        raise RuntimeError(f"decodes did not last to the end: {ended}; a longer context is needed")
    gaps = [pair for record in decodes for pair in _gaps(record, settled)]
    return Watched(
        prefills=[(due - start, over - start) for due, over in prefills],
        gaps=[(begin - start, end - start) for begin, end in gaps],
    )


async def _first_token(
    client: httpx.AsyncClient, target: Target, request: TimedRequest, trace: Trace
) -> tuple[float, float]:
    record = _record(request)
    async with asyncio.timeout(trace.timeout_s):
        await fill(client, target, record)
    if record.error is not None or not record.token_times:
        raise RuntimeError(f"the long prompt failed: {record.error or 'no token came'}")
    return record.due, record.token_times[0]


async def _until_running(records: list[Record], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not all(len(record.token_times) > 1 for record in records):
            if any(record.end for record in records):
                raise RuntimeError(f"decodes failed: {[record.error for record in records]}")
            await asyncio.sleep(0.01)


def _gaps(record: Record, since: float) -> Iterator[tuple[float, float]]:
    return (pair for pair in itertools.pairwise(record.token_times) if pair[0] >= since)


def _record(request: TimedRequest) -> Record:
    now = time.monotonic()
    return Record(request=request, due=now, sent=now)


def _request(texts: random.Random, prompt_len: int, output_len: int) -> TimedRequest:
    prompt = texts.choices(_CODES, k=prompt_len)
    return TimedRequest(due_s=0.0, prompt=prompt, prompt_len=prompt_len, output_len=output_len)
