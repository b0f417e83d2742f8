"""The drivers' conversation, and the queue in which all that one rank hears or does in other
threads comes together."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sps2_mega.comm.channel import Message
from sps2_mega.engine.disaggregated.messages import ControlMessage, decode, encode, kind_of
from sps2_mega.engine.startup.start_rank import StartedRank


@dataclass(frozen=True, slots=True)
class Heard:
    """A message from rank `source` of the job."""

    source: int
    message: ControlMessage


class Control:
    """Control messages to any rank of the job; those to this rank wait in `events`, with what other
    threads put there."""

    def __init__(self, rank: StartedRank) -> None:
        assert rank.bridge is not None, "a job without sides has no bridge"
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._channel = rank.bridge.channel(on_message=self._receive, on_error=rank.watchdog.fail)

    def send(self, dst: int, message: ControlMessage) -> None:
        payload = torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8)
        self._channel.post([Message(dst, kind_of(message), 0, payload)])

    def _receive(self, source: int, kind: int, detail: int, payload: Tensor) -> None:
        self.events.put(Heard(source, decode(kind, payload.numpy().tobytes())))
