"""Open-loop replay: requests are sent at their times, whether or not earlier ones were answered.

A request that is due while `max_in_flight` are in flight waits here, and its waiting counts:
latencies are measured from `due`, so that a slow server cannot hide behind a client that waits for
it. Every record says how late its request was sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks.load.client import Record
from benchmarks.load.requests import TimedRequest

Ask = Callable[[TimedRequest, float], Awaitable[Record]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Records in the order of the requests; `start` is of `time.monotonic()`.

    `client_cpu_s` is this process's CPU time meanwhile: near `duration_s`, the client itself was
    the bottleneck.
    """

    records: list[Record]
    start: float
    duration_s: float
    client_cpu_s: float
    most_in_flight: int


async def replay(
    requests: Sequence[TimedRequest], ask: Ask, *, max_in_flight: int | None, timeout_s: float
) -> Replay:
    """Send all requests and wait for the last answer, at most `timeout_s` after sending each.

    Raises:
        ValueError: `max_in_flight` is not positive.
    """
    if max_in_flight is not None and max_in_flight < 1:
        raise ValueError(f"max_in_flight must be >= 1, got {max_in_flight}")
    places = asyncio.Semaphore(max_in_flight or max(1, len(requests)))
    in_flight = most = 0

    async def one(request: TimedRequest, due: float) -> Record:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                return await ask(request, due)
        except TimeoutError:
            return Record(
                request=request,
                due=due,
                sent=began,
                end=time.monotonic(),
                error="timeout: whole request",
            )
        finally:
            in_flight -= 1
            places.release()

    cpu, start = time.process_time(), time.monotonic()
    tasks = []
    for request in sorted(requests, key=lambda item: item.due_s):
        due = start + request.due_s
        # Taking places one by one keeps requests in order, also while they wait.
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await places.acquire()
        tasks.append(asyncio.create_task(one(request, due)))
    records = list(await asyncio.gather(*tasks))
    return Replay(
        records=records,
        start=start,
        duration_s=time.monotonic() - start,
        client_cpu_s=time.process_time() - cpu,
        most_in_flight=most,
    )
