"""One call of a client: its prompts in the engine, and what has come back of them so far.

Lives in the event loop's thread. Opening, ending and routing of calls is `front`'s; how a call's events become
bytes is `answers`'.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from sps2_mega.serving.http.api_errors import ApiError, timed_out
from sps2_mega.types import OutputDelta, RequestOutput, SamplingParams


@dataclass(frozen=True, slots=True)
class Delta:
    """A step added something to sample `delta.index` of prompt `prompt_index`."""

    prompt_index: int
    delta: OutputDelta


@dataclass(slots=True, kw_only=True)
class Call:
    """Ends when all prompts are answered (`outputs` has one entry each) or with the first failure."""

    call_id: str
    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    deadline: float  # of the event loop's clock
    timeout: float  # seconds, for messages
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    on_close: Callable[[Call], None]
    streamed_tokens: int = 0  # in deltas, which only streams have
    _events: asyncio.Queue[Delta | RequestOutput | ApiError] = field(default_factory=asyncio.Queue)

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
        """The name of one prompt's request in the engine."""
        return f"{self.call_id}/{prompt_index}"

    def add(self, event: Delta | ApiError) -> None:
        if isinstance(event, Delta):
            self.streamed_tokens += len(event.delta.token_ids)
        self._events.put_nowait(event)

    def answer(self, prompt_index: int, output: RequestOutput) -> None:
        if output.error is not None:
            return self.add(ApiError(500, output.error, code="generation_failed"))
        self.outputs[prompt_index] = output
        return self._events.put_nowait(output)

    async def deltas(self, *, silence: float) -> AsyncIterator[Delta | None]:
        """What steps add, until everything is answered; None after each `silence` seconds without.

        Raises:
            ApiError: the call failed, or took too long.
        """
        loop = asyncio.get_running_loop()
        while not (self.is_answered and self._events.empty()):
            left = self.deadline - loop.time()
            if left <= 0:
                raise timed_out(self.timeout)
            try:
                async with asyncio.timeout(min(silence, left)):
                    event = await self._events.get()
            except TimeoutError:
                if silence < left:
                    yield None
                continue
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Delta):
                yield event

    async def finish(self) -> list[RequestOutput]:
        """Waits for everything; one output per prompt, in order.

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
