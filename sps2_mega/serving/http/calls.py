"""One client call: its prompts in the engine, and the results received so far.

A call lives in the event loop's thread. `async_engine` opens, ends and routes calls;
`answers` turns a call's events into bytes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.serving.http.api_errors import ApiError, timed_out
from sps2_mega.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Delta:
    """Step output for sample `delta.index` of prompt `prompt_index`."""

    prompt_index: int
    delta: OutputDelta


@dataclass(slots=True, kw_only=True)
class Call:
    """Call that ends with the last of its prompts' answers, or with the first failure.

    `outputs` has one entry per answered prompt.
    """

    call_id: str
    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    deadline: float  # of the event loop's clock
    timeout: float  # seconds, for messages
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    on_close: Callable[[Call], None]
    streamed_tokens: int = 0  # in deltas, which only streams have
    _events: deque[Delta | ApiError] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_samples(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def is_answered(self) -> bool:
        return len(self.outputs) == len(self.prompts)

    @property
    def age_s(self) -> float:
        return self.timeout - (self.deadline - asyncio.get_running_loop().time())

    def engine_id(self, prompt_index: int) -> str:
        """Request id of one prompt in the engine."""
        return f"{self.call_id}/{prompt_index}"

    def add(self, event: Delta | ApiError) -> None:
        if isinstance(event, Delta):
            self.streamed_tokens += len(event.delta.token_ids)
        self._events.append(event)
        self._news.set()

    def answer(self, prompt_index: int, output: RequestOutput) -> None:
        if output.error is not None:
            return self.add(ApiError(500, output.error, code="generation_failed"))
        self.outputs[prompt_index] = output
        return self._news.set()

    async def deltas(self, *, silence: float) -> AsyncIterator[list[Delta]]:
        """Yield new deltas in batches until every prompt is answered; [] during silence.

        An empty batch follows every `silence` seconds without deltas.

        Raises:
            ApiError: the call failed, or took too long.
        """
        loop = asyncio.get_running_loop()
        heard = loop.time()
        # One timer per silence and not per event: if it fires too early, the next one is set.
        timer: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal timer
            timer = None
            self._news.set()

        try:
            while self._events or not self.is_answered:
                now = loop.time()
                if now >= self.deadline:
                    raise timed_out(self.timeout)
                if self._events:
                    heard = now
                    deltas, failure = self._taken()
                    if deltas:
                        yield deltas
                    if failure is not None:
                        raise failure
                elif now >= heard + silence:
                    heard = now
                    yield []
                else:
                    if timer is None:
                        timer = loop.call_at(min(heard + silence, self.deadline), look)
                    await self._news.wait()
                    self._news.clear()
        finally:
            if timer is not None:
                timer.cancel()

    def _taken(self) -> tuple[list[Delta], ApiError | None]:
        """Take all waiting deltas, and the failure that ends them."""
        deltas: list[Delta] = []
        while self._events:
            event = self._events.popleft()
            if isinstance(event, ApiError):
                return deltas, event
            deltas.append(event)
        return deltas, None

    async def finish(self) -> list[RequestOutput]:
        """Wait until every prompt is answered; return one output per prompt, in order.

        Raises:
            ApiError: the call failed, or took too long.
        """
        async for _ in self.deltas(silence=self.timeout):
            continue
        return [self.outputs[index] for index in range(len(self.prompts))]

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.on_close(self)
