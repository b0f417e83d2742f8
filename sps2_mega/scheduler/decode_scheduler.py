"""Scheduler of the decode pool: blocks for sequences to come, steps for those that are here.

Built from the parts of `scheduler` (ledger, prefix sharing, admission) but without prefills of its
own: a sequence gets its blocks, waits until the prefill pool has filled them, and is then decoded
to its end. Pure Python without a clock or torch.

    add -> waiting --reserve--> receiving --start--> running --commit--> over
              ^                                         |
              '---------------- preempt ----------------'    (prefilled again by the prefill pool)

Blocks are reserved in the order in which the prefill pool would compute (`prefill_queue`): the
least arrival time + `overtake` * expected seconds of prefill first. So a short prompt does not wait
behind a long one that finds no room, and a sequence that arrives later than a prompt's key does not
overtake it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from sps2_mega.config import SchedulerConfig
from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.scheduler.admission import Limits, finish_reason
from sps2_mega.scheduler.prefix_sharing import PrefixSharing
from sps2_mega.types import (
    DecodeItem,
    FinishReason,
    ForwardMode,
    PrefillItem,
    Sequence,
    StepOutput,
    StepPlan,
)

# Prefill steps' worth of sequences with reserved blocks: the prefill pool's choice.
STEPS_AHEAD = 4

# News for ranks besides plans, in order: a sequence that runs from now on, or the id of one that no
# longer does.
Change = PrefillItem | int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks for all tokens of a sequence; the first `num_shared_tokens` of them are cached."""

    sequence: Sequence
    block_ranks: list[int]
    block_ids: list[int]
    num_shared_tokens: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A waiting sequence. The least `key` (seconds) is served first, equal ones in queue order."""

    sequence: Sequence
    key: float


class DecodeScheduler:
    """Blocks of a sequence that is being received stay its own until it is started or dropped:
    nothing is preempted while the prefill pool writes to it.

    `plan` and `commit` alternate; the other methods may be called at any time between a commit and
    the next plan.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        limits: Limits,
        block_size: int,
        num_blocks: int,
        sp_size: int,
        prefix_root: bytes | None = None,
    ) -> None:
        """`num_blocks` is per SP rank; a `prefix_root` (`block_chain`) enables prefix sharing."""
        self._config, self._limits = config, limits
        self._ledger = BlockLedger(
            num_blocks=num_blocks, sp_size=sp_size, block_size=block_size, layout="contiguous"
        )
        self._sharing: PrefixSharing | None = None
        if prefix_root is not None:
            self._sharing = PrefixSharing(self._ledger, root=prefix_root, topology_spans=None)
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()
        self._receiving: dict[int, Reservation] = {}
        self._running: dict[int, Sequence] = {}  # oldest first
        self._changes: list[Change] = []
        self._step = 0

    @property
    def kv_used_per_rank(self) -> tuple[int, ...]:
        """Blocks in use on each SP rank."""
        return self._ledger.used_per_rank

    def add(self, sequence: Sequence, *, prefill_s: float = 0.0) -> None:
        """Queue a sequence whose prefill takes about `prefill_s` seconds (0: not known)."""
        key = sequence.arrival_time + self._config.overtake * prefill_s
        self._waiting[sequence.seq_id] = _Waiting(sequence, key)

    def reserve(self) -> list[Reservation]:
        """Reserve blocks for waiting sequences by their keys, as far as there is room and the
        prefill pool can use them soon."""
        made: list[Reservation] = []
        for waiting in sorted(self._waiting.values(), key=lambda one: one.key):
            if self._num_admitted >= self._config.max_running:
                break
            sequence = waiting.sequence
            if self._prefill_steps_ahead() >= STEPS_AHEAD:
                break  # idle blocks are better used by running sequences
            prefix = None if self._sharing is None else self._sharing.look_up(sequence)
            if self._sharing is not None and prefix is None:
                continue  # it waits for its prefix; the next one may overtake it
            shared = () if prefix is None else prefix.blocks
            # One free block per running sequence: without it one would soon be preempted.
            table = self._ledger.admit(
                sequence.seq_id,
                sequence.num_tokens,
                spare_blocks=self._num_admitted,
                prefix=shared,
            )
            if table is None:
                break
            del self._waiting[sequence.seq_id]
            if prefix is not None and self._sharing is not None:
                self._sharing.begin(sequence, prefix)
            made.append(
                Reservation(
                    sequence,
                    list(table.ranks),
                    list(table.block_ids),
                    len(shared) * self._ledger.block_size,
                )
            )
            self._receiving[sequence.seq_id] = made[-1]
        return made

    def start(self, seq_id: int, token_id: int) -> None:
        """Let a received sequence run: all its tokens are cached, and `token_id` follows them."""
        reservation = self._receiving.pop(seq_id)
        sequence = reservation.sequence
        num_tokens = sequence.num_tokens
        self._changes.append(
            PrefillItem(
                seq_id,
                sequence.tokens_from(0),
                len(sequence.prompt_token_ids),
                reservation.block_ranks,
                reservation.block_ids,
                sequence.params,
                sequence.seed,
                start=num_tokens,
                end=num_tokens,
                num_shared_tokens=reservation.num_shared_tokens,
            )
        )
        if self._sharing is not None:
            self._sharing.cached(sequence)
        sequence.output_token_ids.append(token_id)
        self._running[seq_id] = sequence

    def plan(self) -> StepPlan | None:
        """Plan one token for each running sequence that has room; None where there is none."""
        items = []
        for seq_id in list(self._running):
            sequence = self._running.get(seq_id)
            if sequence is None:
                break  # preempted in this loop, like all younger ones
            position = sequence.num_tokens - 1
            new_block = None
            if position == self._ledger.table(seq_id).capacity:
                new_block = self._grow_or_preempt(seq_id)
                if new_block is None:
                    break
            items.append(DecodeItem(seq_id, sequence.output_token_ids[-1], position, new_block))
        if not items:
            return None
        self._step += 1
        return StepPlan(self._step, ForwardMode.DECODE, [], items, [])

    def take_changes(self) -> list[Change]:
        """Changes that ranks apply before they execute the last plan."""
        changes, self._changes = self._changes, []
        return changes

    def commit(self, plan: StepPlan, output: StepOutput) -> list[FinishReason | None]:
        """Append the step's tokens; return each sequence's finish reason, None while it runs."""
        assert plan.step == self._step, f"step {plan.step} is not the last plan"
        reasons = []
        for item, token_id in zip(plan.decodes, output.token_ids, strict=True):
            sequence = self._running[item.seq_id]
            reason: FinishReason | None = FinishReason.ERROR
            if token_id is not None:
                if self._sharing is not None:
                    self._sharing.cached(sequence)
                sequence.output_token_ids.append(token_id)
                reason = finish_reason(sequence, self._limits)
            if reason is not None:
                self._end(item.seq_id)
            reasons.append(reason)
        return reasons

    def drop(self, seq_id: int) -> None:
        """Forget a sequence in any state; nothing may be on the way to one that is being received.

        Unknown ids are fine: a sequence may have ended here before the prefill driver knew.
        """
        if self._receiving.pop(seq_id, None) is not None:
            self._ledger.release(seq_id)
            if self._sharing is not None:
                self._sharing.ended(seq_id)
        elif seq_id in self._running:
            self._end(seq_id)
        elif self._waiting.pop(seq_id, None) is not None and self._sharing is not None:
            self._sharing.ended(seq_id)

    def check_integrity(self) -> None:
        """Recount sequences and blocks.

        Raises:
            AssertionError: something was lost or is held twice.
        """
        self._ledger.check_integrity()
        waiting = set(self._waiting)
        holders = self._receiving.keys() | self._running.keys()
        assert not self._receiving.keys() & self._running.keys(), "a sequence is in two states"
        assert not waiting & holders, "a waiting sequence holds blocks"
        assert self._ledger.num_sequences == len(holders), "blocks without a sequence"
        if self._sharing is not None:
            self._sharing.check_integrity(holders, waiting | holders)
        if not holders:
            assert self._ledger.num_free == self._ledger.num_blocks, "KV cache blocks leaked"

    def _prefill_steps_ahead(self) -> float:
        """Prefill steps' worth of reserved sequences. A long prompt counts as one step, so that
        short ones can overtake it."""
        largest = self._config.max_prefill_tokens
        tokens = (reservation.sequence.num_tokens for reservation in self._receiving.values())
        return sum(min(count, largest) for count in tokens) / largest

    @property
    def _num_admitted(self) -> int:
        return len(self._receiving) + len(self._running)

    def _grow_or_preempt(self, seq_id: int) -> tuple[int, int] | None:
        """A new block, taken from the youngest running sequence if need be.

        None: `seq_id` itself gave up its blocks, or waits for sequences that are being received and
        cannot be preempted yet.
        """
        while True:
            new_block = self._ledger.grow(seq_id)
            if new_block is not None:
                return new_block
            youngest = next(reversed(self._running))
            if youngest == seq_id and self._receiving:
                return None
            # Alone in the cache a sequence always finds a block: `Limits.max_len` ends it before.
            assert len(self._running) > 1, f"sequence {seq_id} outgrew the KV cache"
            self._preempt(youngest)
            if youngest == seq_id:
                return None

    def _preempt(self, seq_id: int) -> None:
        sequence = self._running.pop(seq_id)
        self._ledger.release(seq_id)
        self._changes.append(seq_id)
        if self._sharing is not None:
            self._sharing.stopped(seq_id)
        sequence.num_preemptions += 1
        # Before all others: its client is in the middle of an answer.
        self._waiting[seq_id] = _Waiting(sequence, -math.inf)
        self._waiting.move_to_end(seq_id, last=False)

    def _end(self, seq_id: int) -> None:
        del self._running[seq_id]
        self._ledger.release(seq_id)
        self._changes.append(seq_id)
        if self._sharing is not None:
            self._sharing.ended(seq_id)
