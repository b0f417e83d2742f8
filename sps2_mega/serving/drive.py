"""Driver that keeps an engine busy with a bounded number of requests from a source of any length.

This module decides when to pull the next request; the caller provides requests and takes answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from sps2_mega.errors import Refusal, RequestError
from sps2_mega.outputs import RequestOutput
from sps2_mega.types import SamplingParams

# Tokenising prompts must not delay running requests by more than a few decode steps.
_FILL_SECONDS = 0.02


class DrivenEngine(Protocol):
    """The part of an engine's interface that driving uses."""

    max_model_len: int

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> Refusal | None: ...

    def step(self) -> list[RequestOutput]: ...

    def has_work(self) -> bool: ...

    def abort(self, request_id: str) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request ready for the engine."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


def drive(
    engine: DrivenEngine,
    source: Iterator[Submission | RequestOutput],
    *,
    max_in_flight: int,
    on_step: Callable[[float], None] | None = None,
) -> Iterator[RequestOutput]:
    """Yield outputs as requests finish, in no particular order.

    A RequestOutput from `source` (an error found on the way) passes through. At
    most `max_in_flight` samples are in the engine at a time. `on_step` is
    called after every step with its seconds.
    """
    filler = _Filler(engine, source, max_in_flight)
    try:
        while True:
            yield from filler.fill()
            if not engine.has_work():
                assert not filler.in_flight, "an idle engine owes answers"
                if filler.exhausted:
                    return
                continue
            began = time.perf_counter()
            outputs = engine.step()
            if on_step is not None:
                on_step(time.perf_counter() - began)
            for output in outputs:
                filler.in_flight.pop(output.request_id, None)
                yield output
    finally:
        # Requests are left only if the caller stopped early: nobody waits for them any more.
        for request_id in filler.in_flight:
            engine.abort(request_id)


class _Filler:
    """Admission of at most `max_in_flight` samples, plus those of one request, to the engine."""

    def __init__(
        self,
        engine: DrivenEngine,
        source: Iterator[Submission | RequestOutput],
        max_in_flight: int,
    ) -> None:
        self._engine, self._source, self._max = engine, source, max_in_flight
        self._held: Submission | None = None  # the engine's queue was full
        self.in_flight: dict[str, int] = {}  # request id -> samples
        self.exhausted = False

    def fill(self) -> Iterator[RequestOutput]:
        """Add requests while there is room; yield those that will never run."""
        began = time.perf_counter()
        samples = sum(self.in_flight.values())
        while not self.exhausted and samples < self._max:
            if samples and time.perf_counter() - began > _FILL_SECONDS:
                return
            item, self._held = self._held or next(self._source, None), None
            if item is None:
                self.exhausted = True
            elif isinstance(item, RequestOutput):
                yield item
            else:
                refused = _add(self._engine, item)
                if refused is Refusal.QUEUE_FULL and samples:
                    self._held = item
                    return
                if refused is None:
                    self.in_flight[item.request_id] = item.params.n
                    samples += item.params.n
                else:
                    yield failed(item.request_id, _refusal_text(refused, item, self._engine))


def failed(request_id: str, error: str, prompt_token_ids: list[int] | None = None) -> RequestOutput:
    """Output of a request that never ran."""
    return RequestOutput(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids or [],
        completions=[],
        error=error,
    )


def _add(engine: DrivenEngine, item: Submission) -> Refusal | str | None:
    try:
        return engine.add_request(item.request_id, item.prompt_token_ids, item.params)
    except RequestError as error:
        return str(error)


def _refusal_text(refused: Refusal | str, item: Submission, engine: DrivenEngine) -> str:
    if isinstance(refused, str):
        return refused
    length, new = len(item.prompt_token_ids), item.params.max_tokens
    wanted = "the rest" if new is None else f"{new} new"
    return (
        f"{refused.value} (prompt {length} tokens, {wanted} requested, "
        f"limit {engine.max_model_len} together)"
    )
