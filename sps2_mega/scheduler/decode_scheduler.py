"""What the decode pool does next: room for sequences that will come, and steps for those that are
there.

Made of the parts that `engine.scheduler` is made of (ledger, prefix sharing, admission) but without
prefills of its own: a sequence gets its blocks, waits until the other pool has filled them, and is
then decoded to its end. Pure Python without a clock or torch.

    add -> waiting --reserve--> receiving --start--> running --commit--> over
              ^                                         |
              '---------------- preempt ----------------'    (what it has is computed anew on the other pool)

Blocks are reserved in the order in which the prefill pool would compute (`prefill_queue`): the
least arrival time + `overtake` * expected seconds of prefill first. So a short prompt does not wait
behind a long one that finds no room, and who comes later than a prompt's key does not go before it.
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

# So many prefill steps' worth of sequences have blocks before their keys come: what the other pool
# can choose from.
STEPS_AHEAD = 4

# What ranks must know besides plans, in this order: a sequence that runs from now on, or one (its
# id) that no longer does.
Change = PrefillItem | int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks for all tokens that a sequence has; the first `num_shared_tokens` of them are
    cached."""

    sequence: Sequence
    block_ranks: list[int]
    block_ids: list[int]
    num_shared_tokens: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    """`key`, in seconds: the least goes first, of equal ones who stands before the other in the
    queue."""

    sequence: Sequence
    key: float


class DecodeScheduler:
    """Blocks of a sequence that is being received stay its own until it is started or dropped:
    nobody is preempted while somebody writes to its blocks.

    `plan` and `commit` alternate; the others may come at any time between a commit and the next
    plan.
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
        """`num_blocks` is per sp rank; `prefix_root` (`block_chain.chain_root`) switches prefix
        sharing on."""
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
        """Blocks of each sp rank that sequences hold."""
        return self._ledger.used_per_rank

    def add(self, sequence: Sequence, *, prefill_s: float = 0.0) -> None:
        """Queue a sequence whose tokens will be computed elsewhere, in about `prefill_s` seconds
        (0: not known)."""
        key = sequence.arrival_time + self._config.overtake * prefill_s
        self._waiting[sequence.seq_id] = _Waiting(sequence, key)

    def reserve(self) -> list[Reservation]:
        """Blocks for those that wait, by their keys, as far as there is room and the other pool can
        use it soon."""
        made: list[Reservation] = []
        for waiting in sorted(self._waiting.values(), key=lambda one: one.key):
            if self._num_admitted >= self._config.max_running:
                break
            sequence = waiting.sequence
            if self._prefill_steps_ahead() >= STEPS_AHEAD:
                break  # blocks that nobody fills for long are better used by those that run
            prefix = None if self._sharing is None else self._sharing.look_up(sequence)
            if self._sharing is not None and prefix is None:
                continue  # it comes when its prefix is there; the next one may go ahead
            shared = () if prefix is None else prefix.blocks
            # One free block for each running sequence: without it somebody would soon be preempted.
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
        """All tokens of a received sequence are cached, and `token_id` follows them: it runs from
        now on."""
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
        """One token for each running sequence that has room for it; None when there is nobody."""
        items = []
        for seq_id in list(self._running):
            sequence = self._running.get(seq_id)
            if sequence is None:
                break  # preempted in this loop, and all that are younger too
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
        """What ranks carry out before they execute the last plan."""
        changes, self._changes = self._changes, []
        return changes

    def commit(self, plan: StepPlan, output: StepOutput) -> list[FinishReason | None]:
        """Append the step's tokens; for each one why it was the last of its sequence, None where
        that goes on."""
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
        """Forget a sequence in any state; one that is received must have nothing on the way any
        more. Unknown ids are fine: it may have ended here before the other pool knew."""
        if self._receiving.pop(seq_id, None) is not None:
            self._ledger.release(seq_id)
            if self._sharing is not None:
                self._sharing.ended(seq_id)
        elif seq_id in self._running:
            self._end(seq_id)
        elif self._waiting.pop(seq_id, None) is not None and self._sharing is not None:
            self._sharing.ended(seq_id)

    def check_integrity(self) -> None:
        """Recount sequences and blocks. Raises AssertionError when something was lost or is held
        twice."""
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
        """A long prompt counts as one, so that short ones can overtake it."""
        largest = self._config.max_prefill_tokens
        tokens = (reservation.sequence.num_tokens for reservation in self._receiving.values())
        return sum(min(count, largest) for count in tokens) / largest

    @property
    def _num_admitted(self) -> int:
        return len(self._receiving) + len(self._running)

    def _grow_or_preempt(self, seq_id: int) -> tuple[int, int] | None:
        """A new block, taken from the youngest running sequence if need be. None: `seq_id` itself
        gave up its own, or waits for sequences that are on their way here and cannot be preempted
        yet."""
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
        # Before all others, whoever they are: its client is in the middle of an answer.
        self._waiting[seq_id] = _Waiting(sequence, -math.inf)
        self._waiting.move_to_end(seq_id, last=False)

    def _end(self, seq_id: int) -> None:
        del self._running[seq_id]
        self._ledger.release(seq_id)
        self._changes.append(seq_id)
        if self._sharing is not None:
            self._sharing.ended(seq_id)
