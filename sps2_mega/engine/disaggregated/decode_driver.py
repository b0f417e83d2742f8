"""Driver of the decode pool, on its first rank.

Reserves blocks for sequences, starts each one when its keys and values have arrived, and decodes.
All it knows of clients comes from the prefill driver (`messages`). It blocks on messages only where
there is nothing to decode.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field

from sps2_mega.engine.disaggregated.control import Received, agree
from sps2_mega.engine.disaggregated.decode_rank import DecodeRank
from sps2_mega.engine.disaggregated.kv_transfer import (
    Destination,
    original,
    receiving_ranks,
    repeated,
)
from sps2_mega.engine.disaggregated.kv_transfer_plan import Placement
from sps2_mega.engine.disaggregated.messages import (
    Arrived,
    ControlMessage,
    Drop,
    Expect,
    Leave,
    Left,
    NewToken,
    Room,
    Start,
    Tokens,
)
from sps2_mega.engine.failing import failing
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.kv_cache.block_chain import chain_root
from sps2_mega.scheduler.decode_scheduler import DecodeScheduler, Reservation
from sps2_mega.types import Sequence, StepOutput, StepPlan

_PREFILL_DRIVER = 0


@dataclass(slots=True)
class _Handoff:
    """A sequence that is being received.

    `expected` and `arrived` are (handoff, rank) of messages Arrived. The blocks of a `dropped` one
    are freed when everything expected has arrived.
    """

    number: int
    seq_id: int
    ranks: tuple[int, ...]
    expected: set[tuple[int, int]]
    arrived: set[tuple[int, int]] = field(default_factory=set)
    token_id: int | None = None
    dropped: bool = False


class DecodeDriver:
    """Every block that the prefill pool may still write to belongs to a handoff."""

    def __init__(self, rank: StartedRank) -> None:
        self._started, self._pool, self._block_size = rank, rank.pool, rank.config.cache.block_size
        self._rank = DecodeRank(rank)
        self._events = self._rank.control.events
        self._handoffs: dict[int, _Handoff] = {}
        self._handoff_of: dict[int, _Handoff] = {}  # by sequence
        self._num_handoffs = 0
        self._leaving = self._reported_idle = False

    def run(self) -> None:
        """Serve the prefill driver until it leaves."""
        with failing(self._started.watchdog):
            self._scheduler = self._make_scheduler()
            while not (self._leaving and not self._handoffs):
                self._work()
            self._scheduler.check_integrity()
            self._send(Left())
            self._rank.dismiss()
        self._started.leave()

    def _make_scheduler(self) -> DecodeScheduler:
        rank = self._started
        agreement = agree(rank, self._rank.control, _PREFILL_DRIVER, prefixes=True)
        return DecodeScheduler(
            rank.config.scheduler,
            limits=agreement.limits,
            block_size=self._block_size,
            num_blocks=rank.num_blocks,
            sp_size=rank.groups.sp.size,
            prefix_root=chain_root(rank.config.csa) if agreement.shares_prefixes else None,
        )

    def _work(self) -> None:
        """Run one step; where there is none, wait for a message."""
        for reservation in self._scheduler.reserve():
            self._offer(reservation)
        plan = self._scheduler.plan()
        if plan is not None:
            output = self._rank.lead(plan, self._scheduler.take_changes())
            self._report(plan, output)
            self._reported_idle = False
        elif not self._reported_idle and not self._handoffs:
            self._scheduler.check_integrity()
            self._reported_idle = True
        self._handle_messages(wait=plan is None)

    def _handle_messages(self, *, wait: bool) -> None:
        """Handle all messages in the queue; with `wait`, block for the first one."""
        while True:
            try:
                received: Received = self._events.get(block=wait)
            except queue.Empty:
                return
            wait = False
            self._handle(received.source, received.message)

    def _handle(self, source: int, message: ControlMessage) -> None:
        match message:
            case Expect():
                self._scheduler.add(
                    Sequence(
                        seq_id=message.seq_id,
                        prompt_token_ids=message.prompt_token_ids,
                        params=message.params,
                        seed=message.seed,
                        max_tokens=message.max_tokens,
                        arrival_time=time.monotonic(),
                    ),
                    prefill_s=message.prefill_s,
                )
            case Start():
                handoff = self._handoffs[message.handoff]
                handoff.token_id = message.token_id
                self._settle(handoff)
            case Arrived():
                # Unknown: a rank that had received all of it before the cut reports it twice.
                arriving = self._handoffs.get(original(message.handoff))
                if arriving is not None:
                    arriving.arrived.add((message.handoff, source))
                    self._settle(arriving)
            case Drop():
                self._drop(message)
            case Leave():
                self._leaving = True
            case _:
                raise AssertionError(f"the decode pool does not expect {message}")

    def _drop(self, message: Drop) -> None:
        handoff = self._handoff_of.get(message.seq_id)
        if handoff is None or handoff.number != message.handoff:
            # Nothing of it is on the way: not begun, or complete.
            if handoff is not None:
                self._forget(handoff)
            self._release(message.seq_id)
            return
        handoff.dropped = True
        if message.damaged:
            handoff.expected |= {(repeated(handoff.number), rank) for rank in handoff.ranks}
        self._settle(handoff)

    def _settle(self, handoff: _Handoff) -> None:
        """Start or release a sequence whose last part may have arrived."""
        if handoff.expected - handoff.arrived or (handoff.token_id is None and not handoff.dropped):
            return
        self._forget(handoff)
        if handoff.dropped:
            self._release(handoff.seq_id)
        else:
            assert handoff.token_id is not None
            self._scheduler.start(handoff.seq_id, handoff.token_id)

    def _forget(self, handoff: _Handoff) -> None:
        del self._handoffs[handoff.number], self._handoff_of[handoff.seq_id]

    def _release(self, seq_id: int) -> None:
        self._scheduler.drop(seq_id)
        self._reported_idle = False
        self._send(Tokens([], self._scheduler.kv_used_per_rank))

    def _offer(self, reservation: Reservation) -> None:
        sequence, number = reservation.sequence, self._num_handoffs
        self._num_handoffs += 1
        first = reservation.num_shared_tokens
        ranks = receiving_ranks(
            Destination(number, first, Placement(reservation.block_ranks, reservation.block_ids)),
            sequence.num_tokens,
            decode=self._pool,
            block_size=self._block_size,
        )
        handoff = _Handoff(
            number, sequence.seq_id, tuple(ranks), {(number, rank) for rank in ranks}
        )
        self._handoffs[number] = self._handoff_of[sequence.seq_id] = handoff
        self._send(
            Room(
                sequence.seq_id,
                number,
                sequence.num_tokens,
                first,
                reservation.block_ranks,
                reservation.block_ids,
            )
        )

    def _report(self, plan: StepPlan, output: StepOutput) -> None:
        reasons = self._scheduler.commit(plan, output)
        tokens = [
            NewToken(item.seq_id, token_id, logprob, reason)
            for item, token_id, logprob, reason in zip(
                plan.decodes, output.token_ids, output.logprobs, reasons, strict=True
            )
        ]
        self._send(Tokens(tokens, self._scheduler.kv_used_per_rank))

    def _send(self, message: ControlMessage) -> None:
        self._rank.control.send(_PREFILL_DRIVER, message)
