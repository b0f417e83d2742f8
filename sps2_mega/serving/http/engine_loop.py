"""Main-thread loop of the server: takes commands between steps, runs steps, delivers results.

It runs in rank 0's main thread until `Stop`. `async_engine` admits calls and handles results.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from sps2_mega.errors import Refusal, RequestError
from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    engine_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    stream: bool
    arrival_time: float  # of time.monotonic()


@dataclass(frozen=True, slots=True)
class Abort:
    engine_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the loop after the current step; requests still in the engine are dropped."""


Command = Submit | Abort | Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Results of one turn of the loop; `refused` are (engine id, reason) of submissions."""

    deltas: list[OutputDelta] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    refused: list[tuple[str, Refusal | str]] = field(default_factory=list)
    stats: Any  # EngineStats


class ServedEngine(Protocol):
    """The part of an engine that serving uses, besides `max_model_len` and `tokenizer`."""

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        stream: bool = False,
    ) -> Refusal | None: ...

    def abort(self, request_id: str) -> bool: ...

    def has_work(self) -> bool: ...

    def step(self) -> list[RequestOutput]: ...

    def take_deltas(self) -> list[OutputDelta]: ...

    def stats(self) -> Any: ...


def run_engine(
    engine: ServedEngine,
    commands: queue.SimpleQueue[Command],
    deliver: Callable[[StepResult], None],
) -> None:
    """Serve until `Stop`; an idle engine costs nothing. Aborts take effect before the next step."""
    while True:
        refused, stopped = _take_commands(engine, commands)
        if stopped:
            return
        outputs = engine.step() if engine.has_work() else []
        deliver(
            StepResult(
                deltas=engine.take_deltas(), outputs=outputs, refused=refused, stats=engine.stats()
            )
        )


def _take_commands(
    engine: ServedEngine, commands: queue.SimpleQueue[Command]
) -> tuple[list[tuple[str, Refusal | str]], bool]:
    """Carry out all waiting commands; block for one if the engine is idle."""
    refused: list[tuple[str, Refusal | str]] = []
    command: Command | None = None if engine.has_work() else commands.get()
    while True:
        if command is None:
            try:
                command = commands.get_nowait()
            except queue.Empty:
                return refused, False
        match command:
            case Stop():
                return refused, True
            case Abort():
                engine.abort(command.engine_id)
            case Submit():
                reason = _submit(engine, command)
                if reason is not None:
                    refused.append((command.engine_id, reason))
        command = None


def _submit(engine: ServedEngine, command: Submit) -> Refusal | str | None:
    try:
        return engine.add_request(
            command.engine_id,
            command.prompt_token_ids,
            command.params,
            arrival_time=command.arrival_time,
            stream=command.stream,
        )
    except RequestError as error:
        return str(error)
