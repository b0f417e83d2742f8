"""The engine as the event loop sees it: admission of calls, and routing of results to them.

    LOADING --ready--> READY --drain--> DRAINING        any --fail--> FAILED
       503             open calls       503, open calls end            503, open calls fail

Everything but `fail_soon` and `drain_soon` runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sps2_mega.engine.startup.memory_table import RankMemory
from sps2_mega.engine.stats import KVUse
from sps2_mega.errors import Refusal
from sps2_mega.parallel.rank_pools import RankPool
from sps2_mega.serving.http.api_errors import ApiError, queue_full, refused
from sps2_mega.serving.http.calls import Call, Delta
from sps2_mega.serving.http.engine_loop import Abort, Command, StepResult, Stop, Submit
from sps2_mega.serving.http.prometheus import ServerMetrics
from sps2_mega.serving.http.recent_waits import RecentWaits
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import SamplingParams

_LOADING_RETRY_S, _DOWN_RETRY_S = 5, 10
# Seconds that a dying process waits for its clients to be told.
FAREWELL_S = 0.5


class State(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedFacts:
    """Facts for monitoring: ranks and their memory, and the KV cache before the first step.

    `pools` are one pool of all ranks, or the prefill pool and the decode pool.
    Levels and transport are those of the first pool.
    """

    world_size: int
    pools: tuple[RankPool, ...]
    sp_levels: tuple[int, ...]
    device: str
    dtype: str
    transport: str
    max_model_len: int
    block_size: int
    kv_pools: tuple[KVUse, ...]
    memory: tuple[RankMemory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Facts about the loaded model; `refusal` gives the reason why a request can never run."""

    tokenizer: Tokenizer | None
    max_len: int
    refusal: Callable[[list[int], SamplingParams], Refusal | None]
    facts: ServedFacts


class AsyncEngine:
    """Open calls of an engine; each ends exactly once: answered, failed, or left by its client."""

    def __init__(self, *, max_samples: int, request_timeout: float, metrics: ServerMetrics) -> None:
        """Admit at most `max_samples` samples at a time, running and waiting ones together."""
        self.state = State.LOADING
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.stats: Any = None
        self.metrics = metrics
        self.recent_waits = RecentWaits()
        self.stage: str | None = None  # of a loading server
        self.reason: str | None = None  # of a failure
        self._max_samples, self._timeout = max_samples, request_timeout
        self.served: ServedModel | None = None
        self._calls: dict[str, Call] = {}
        self._open_samples = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nobody_left = threading.Event()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "the server has not started"
        return self._loop

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    @property
    def num_open(self) -> int:
        return len(self._calls)

    def oldest_calls(self, limit: int) -> list[Call]:
        """First `limit` open calls in order of arrival."""
        return list(itertools.islice(self._calls.values(), limit))

    @property
    def model(self) -> ServedModel:
        """The loaded model.

        Raises:
            ApiError: 503, if requests cannot be taken now.
        """
        if self.state is State.READY:
            assert self.served is not None
            return self.served
        text = {
            State.LOADING: "the model is loading",
            State.DRAINING: "the server is shutting down",
            State.FAILED: f"the server has failed: {self.reason}",
        }[self.state]
        retry = _LOADING_RETRY_S if self.state is State.LOADING else _DOWN_RETRY_S
        raise ApiError(503, text, code=self.state.value, retry_after=retry)

    def open(self, prompts: list[list[int]], params: SamplingParams, *, stream: bool) -> Call:
        """Hand the prompts to the engine; the caller must close the call (`with`).

        Raises:
            ApiError: they cannot run now, or never.
        """
        model = self.model
        if params.stop and model.tokenizer is None:
            raise ApiError(
                400, "stop strings need a tokenizer, and the model has none", param="stop"
            )
        for prompt in prompts:
            reason = model.refusal(prompt, params)
            if reason is not None:
                raise refused(
                    reason,
                    num_prompt_tokens=len(prompt),
                    max_tokens=params.max_tokens,
                    max_len=model.max_len,
                )
        call = Call(
            call_id=uuid.uuid4().hex,
            prompts=prompts,
            params=params,
            stream=stream,
            deadline=asyncio.get_running_loop().time() + self._timeout,
            timeout=self._timeout,
            on_close=self._close,
        )
        if call.num_samples > self._max_samples:
            raise ApiError(
                400, f"{call.num_samples} samples in one request; {self._max_samples} are possible"
            )
        if self._open_samples + call.num_samples > self._max_samples:
            self.metrics.rejected("queue_full")
            raise queue_full()
        self._submit(call)
        return call

    def _submit(self, call: Call) -> None:
        self._open_samples += call.num_samples
        self._calls[call.call_id] = call
        now = time.monotonic()
        for index, prompt in enumerate(call.prompts):
            self.commands.put(
                Submit(
                    engine_id=call.engine_id(index),
                    prompt_token_ids=prompt,
                    params=call.params,
                    stream=call.stream,
                    arrival_time=now,
                )
            )

    def _close(self, call: Call) -> None:
        if self._calls.pop(call.call_id, None) is None:
            return
        self._open_samples -= call.num_samples
        if not call.is_answered:
            self.metrics.aborted()
            for index in set(range(len(call.prompts))) - call.outputs.keys():
                self.commands.put(Abort(call.engine_id(index)))
        if not self._calls:
            self._nobody_left.set()
            if self.state is State.DRAINING:
                self.commands.put(Stop())

    def deliver(self, result: StepResult) -> None:
        """Deliver each result to its call, dropping results of calls that clients have left."""
        if self.stats is None or self.stats.num_steps < result.stats.num_steps:
            self.recent_waits.add(result.stats.last_waits)
        self.stats = result.stats
        self.metrics.engine_stats(result.stats)
        for delta in result.deltas:
            call, index = self._find(delta.request_id)
            if call is not None:
                call.add(Delta(index, delta))
        for output in result.outputs:
            call, index = self._find(output.request_id)
            self.metrics.finished(output)
            if call is not None:
                call.answer(index, output)
        for engine_id, reason in result.refused:
            call, index = self._find(engine_id)
            if call is not None:
                call.add(self._refused(call, index, reason))

    def _find(self, engine_id: str) -> tuple[Call | None, int]:
        call_id, _, index = engine_id.rpartition("/")
        return self._calls.get(call_id), int(index)

    def _refused(self, call: Call, index: int, reason: Refusal | str) -> ApiError:
        if isinstance(reason, str):
            return ApiError(400, reason)
        max_len = self.served.max_len if self.served else 0
        return refused(
            reason,
            num_prompt_tokens=len(call.prompts[index]),
            max_tokens=call.params.max_tokens,
            max_len=max_len,
        )

    def loading(self, stage: str) -> None:
        """Set the stage of the start."""
        if self.state is State.LOADING:
            self.stage = stage

    def ready(self, model: ServedModel) -> None:
        """Enter READY; a server that is draining or has failed stays so."""
        self.served, self.stage = model, None
        if self.state is State.LOADING:
            self.state = State.READY

    def drain(self, timeout: float) -> None:
        """Refuse new calls; stop the engine after the last call, or after `timeout` seconds."""
        if self.state is not State.READY:
            return
        self.state = State.DRAINING
        if not self._calls:
            self.commands.put(Stop())
            return
        asyncio.get_running_loop().call_later(timeout, self._end_drain)

    def _end_drain(self) -> None:
        self._fail_calls("the server is shutting down")
        self.commands.put(Stop())

    def fail(self, reason: str) -> None:
        self.state, self.reason, self.stage = State.FAILED, reason, None
        self._fail_calls(reason)

    def _fail_calls(self, reason: str) -> None:
        for call in self._calls.values():
            call.add(ApiError(503, reason, code="server_failed", retry_after=_DOWN_RETRY_S))

    def drain_soon(self, timeout: float) -> bool:
        """`drain` from another thread; False if nothing is served yet, or no longer."""
        if self._loop is None or self.state is not State.READY:
            return False
        self._loop.call_soon_threadsafe(self.drain, timeout)
        return True

    def fail_soon(self, reason: str) -> None:
        """`fail` from another thread, for a dying process; waits a moment for clients to read."""
        if self._loop is None or self._loop.is_closed():
            return
        self._nobody_left.clear()
        self._loop.call_soon_threadsafe(self._fail_then_tell, reason)
        self._nobody_left.wait(FAREWELL_S)
        time.sleep(0.05)  # the last response reaches the kernel only after its call is closed

    def _fail_then_tell(self, reason: str) -> None:
        self.fail(reason)
        if not self._calls:
            self._nobody_left.set()
