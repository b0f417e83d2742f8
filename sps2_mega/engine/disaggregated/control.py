"""Control messages between the drivers, and the queue in which a rank's events meet.

Messages, finished steps and arrivals enter the queue from other threads; the main thread takes
them.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sps2_mega.comm.channel import Message
from sps2_mega.engine.disaggregated.messages import ControlMessage, Hello, decode, encode, kind_of
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.scheduler.admission import Limits


@dataclass(frozen=True, slots=True)
class Received:
    """Message from rank `source` of the job."""

    source: int
    message: ControlMessage


class Control:
    """Control messages between any two ranks of the job.

    Messages to this rank enter `events`, beside what other threads put there.
    """

    def __init__(self, rank: StartedRank) -> None:
        assert rank.bridge is not None, "a job without pools has no bridge"
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._channel = rank.bridge.channel(on_message=self._receive, on_error=rank.watchdog.fail)

    def send(self, dst: int, message: ControlMessage) -> None:
        """Post a message to rank `dst` of the job without waiting."""
        payload = torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8)
        self._channel.post([Message(dst, kind_of(message), 0, payload)])

    def _receive(self, source: int, kind: int, detail: int, payload: Tensor) -> None:
        self.events.put(Received(source, decode(kind, payload.numpy().tobytes())))


@dataclass(frozen=True, slots=True)
class Agreement:
    """Facts that both drivers know before the first request.

    `limits` hold for every sequence: it must fit either pool, since a preempted one is prefilled
    again. `shares_prefixes`: both pools may reuse the blocks of common prefixes. `num_blocks_there`
    counts the blocks of the other pool.
    """

    limits: Limits
    shares_prefixes: bool
    num_blocks_there: int


def agree(rank: StartedRank, control: Control, other_driver: int, *, prefixes: bool) -> Agreement:
    """Exchange Hello with the other pool's driver, before any other message.

    `prefixes`: whether this pool can share the blocks of common prefixes.
    """
    num_blocks = rank.num_blocks * rank.groups.sp.size
    prefixes = prefixes and not rank.config.cache.no_prefix_caching
    own = Hello(num_blocks * rank.config.cache.block_size, num_blocks, prefixes)
    control.send(other_driver, own)
    theirs = control.events.get().message
    assert isinstance(theirs, Hello), f"the first message was {theirs}"
    model = rank.resolved.config
    limits = Limits(
        max_model_len=rank.max_model_len,
        cache_tokens=min(own.cache_tokens, theirs.cache_tokens),
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset(model.eos_token_ids),
    )
    return Agreement(limits, prefixes and theirs.shares_prefixes, theirs.num_blocks)
