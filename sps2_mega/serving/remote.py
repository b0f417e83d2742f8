"""`Generation` in another process: calls and answers go through a pipe between parent and child.

    caller's process                  rank 0
    RemoteGeneration  --- call ---->  serve_calls
                      <-- answer ---
                      <-- reason ---  the end of the job, as the watchdog tells it

Whatever happens to a rank, the caller gets an exception: its process takes part in no collective,
and holds no connection but this pipe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sps2_mega.config import EngineConfig
from sps2_mega.errors import CheckpointError, ConfigError, RankFailure, RequestError
from sps2_mega.outputs import RequestOutput
from sps2_mega.serving.local_ranks import LocalRanks
from sps2_mega.types import SamplingParams

if TYPE_CHECKING:
    from sps2_mega.serving.generation import Generation, Message, Prompt

_ERRORS = {kind.__name__: kind for kind in (ConfigError, CheckpointError, RequestError)}
_REASON = "reason"


class RemoteGeneration:
    """All ranks as children, and the `Generation` on the first of them."""

    def __init__(self, config: EngineConfig) -> None:
        """Start the ranks, and wait until they can answer.

        Raises:
            ConfigError, CheckpointError: they cannot; the message says why.
            RankFailure: one of them was lost meanwhile.
        """
        self._pipe, theirs = Pipe()
        self._closed = False
        try:
            self.ranks = LocalRanks(config, driver=theirs)
        except BaseException:
            self._pipe.close()
            raise
        finally:
            theirs.close()
        self._answer()

    def generate(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        return self._call("generate", prompts, params)

    def chat(
        self, conversations: Sequence[Sequence[Message]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        return self._call("chat", conversations, params)

    def close(self) -> None:
        """End all ranks; safe to call twice."""
        if not self._closed:
            try:
                self._call("close")
            except RankFailure:
                return  # the job has ended, which is what was asked for
            self._end(told=True)

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._closed:
            raise RankFailure("the ranks of this LLM have ended: make another one")
        with contextlib.suppress(OSError):  # a lost rank: `_answer` finds out why
            self._pipe.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
            if kind == _REASON:
                raise RankFailure(value)
        except (EOFError, OSError):
            lost = self.ranks.await_loss()
            self._end(told=False)
            raise RankFailure(lost or "rank 0 ended without a word") from None
        except BaseException:  # also Ctrl-C: an answer that nobody waits for would come later
            self._end(told=False)
            raise
        if kind == "answer":
            return value
        if kind != RequestError.__name__:
            self._end(told=False)
        raise _ERRORS[kind](value)

    def _end(self, *, told: bool) -> None:
        self._closed = True
        self.ranks.close(told=told)
        self._pipe.close()


def serve_calls(pipe: Connection, start: Callable[[], Generation]) -> bool:
    """Answer the parent's calls until it closes; `start` returns the Generation.

    False where it was refused, as the parent knows then.
    """
    from sps2_mega.comm.crash_report import on_end

    on_end(lambda reason: pipe.send((_REASON, reason)))
    try:
        generation = start()
    except (ConfigError, CheckpointError) as error:
        pipe.send((type(error).__name__, str(error)))
        return False
    pipe.send(("answer", None))
    while True:
        name, arguments = pipe.recv()
        try:
            answer = "answer", getattr(generation, name)(*arguments)
        except RequestError as error:
            answer = RequestError.__name__, str(error)
        pipe.send(answer)
        if name == "close":
            return True
