"""What the next step does: continuous batching, first come first served, prefill before decode.

Decides which sequences run, wait or are preempted. Does not decide where blocks go (`kv_cache`), nor when
a request is refused or a sequence is over (`admission`). Pure Python without a clock or torch, so a
simulator can drive the very same scheduler.

    add -> waiting -> plan: prefill -> running -> plan: decode, decode, ... -> commit: finished
              ^----------- preempted, when no block is free -----------'
"""

from __future__ import annotations

from collections import deque

from sps2_mega.config import SchedulerConfig
from sps2_mega.engine.admission import Limits, finish_reason, refusal
from sps2_mega.errors import Refusal
from sps2_mega.kv_cache.block_table import BlockTable
from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.kv_cache.placement import Layout
from sps2_mega.types import (
    DecodeItem,
    FinishReason,
    ForwardMode,
    PrefillItem,
    Sequence,
    StepOutput,
    StepPlan,
)


class Scheduler:
    """A sequence is either waiting, without blocks, or running, with blocks for all tokens but the last.

    `plan` and `commit` alternate; `add`, `finish` and `abort` may come at any time between them. Blocks of a
    dropped sequence are reused at once: ranks execute plans in order, and forget what a plan lists as
    `released` before they execute it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        block_size: int,
        num_blocks: int,
        sp_size: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        layout: Layout = "contiguous",
    ) -> None:
        """`num_blocks` is per sp rank; `layout` is how a prompt is spread, as the transport prefers it."""
        self._config = config
        self._limits = Limits(
            max_model_len=max_model_len,
            cache_tokens=num_blocks * sp_size * block_size,
            vocab_size=vocab_size,
            eos_token_ids=frozenset(eos_token_ids),
        )
        self._ledger = BlockLedger(
            num_blocks=num_blocks, sp_size=sp_size, block_size=block_size, layout=layout
        )
        self._waiting: deque[Sequence] = deque()
        # In order of arrival, as insertion order: the youngest is preempted first and comes back first.
        self._running: dict[int, Sequence] = {}
        self._known: set[int] = set()  # ids of all that wait or run
        self._released: list[int] = []
        self._planned: list[Sequence] | None = None
        self._step = 0
        self._idle_checked = True

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._known)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache blocks of all sp ranks that are in use, in [0, 1]."""
        return 1.0 - self._ledger.num_free / max(1, self._ledger.num_blocks)

    @property
    def max_len(self) -> int:
        """Longest prompt plus output that can run here, in tokens: the model's limit or the cache's."""
        return self._limits.max_len

    def add(self, sequence: Sequence) -> Refusal | None:
        """Queue a sequence, or say why not. The scheduler alone changes it from now on."""
        if sequence.seq_id in self._known:
            return Refusal.DUPLICATE_ID
        reason = refusal(sequence, self._limits)
        if reason is not None:
            return reason
        max_waiting = self._config.max_waiting
        if max_waiting is not None and len(self._waiting) >= max_waiting:
            return Refusal.QUEUE_FULL
        self._known.add(sequence.seq_id)
        self._waiting.append(sequence)
        return None

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to do. `now` is time.monotonic() in seconds."""
        assert self._planned is None, "plan() came before the last plan was committed"
        if not self._known:
            self._check_when_idle()
            return None
        self._idle_checked = False
        prefills = self._plan_prefills(now)
        decodes = [] if prefills else self._plan_decodes()
        released, self._released = self._released, []
        items: list[PrefillItem] | list[DecodeItem] = prefills or decodes
        self._planned = [self._running[item.seq_id] for item in items]
        self._step += 1
        mode = ForwardMode.PREFILL if prefills else ForwardMode.DECODE
        return StepPlan(self._step, mode, prefills, decodes, released)

    def commit(self, plan: StepPlan, output: StepOutput, now: float) -> list[Sequence]:
        """Append one token per item of the plan; returns the sequences that ended with it.

        Tokens of sequences that were finished or aborted since the plan are dropped. A sequence for which
        there is no token has failed.
        """
        planned, self._planned = self._planned, None
        assert planned is not None and plan.step == self._step, (
            f"step {plan.step} is not the last plan"
        )
        assert len(output.token_ids) == len(output.logprobs) == len(planned), (
            f"{len(planned)} sequences were planned, the output has {len(output.token_ids)} tokens"
        )
        finished = []
        for sequence, token_id, logprob in zip(
            planned, output.token_ids, output.logprobs, strict=True
        ):
            if self._running.get(sequence.seq_id) is not sequence:
                continue
            if token_id is None:
                self.finish(sequence.seq_id, FinishReason.ERROR)
                finished.append(sequence)
                continue
            sequence.output_token_ids.append(token_id)
            sequence.token_times.append(now)
            if logprob is not None:
                sequence.logprobs.append(logprob)
            reason = finish_reason(sequence, self._limits)
            if reason is not None:
                self.finish(sequence.seq_id, reason)
                finished.append(sequence)
        return finished

    def finish(self, seq_id: int, reason: FinishReason) -> bool:
        """End a waiting or running sequence (the engine found a stop string); False when it is not here."""
        if seq_id not in self._known:
            return False
        self._known.remove(seq_id)
        sequence = self._running.get(seq_id)
        if sequence is not None:
            self._release(sequence)
        else:
            index = next(i for i, waiting in enumerate(self._waiting) if waiting.seq_id == seq_id)
            sequence = self._waiting[index]
            del self._waiting[index]
        sequence.finish_reason = reason
        return True

    def abort(self, seq_id: int) -> bool:
        """End a sequence in any state; False when it is not here (any more)."""
        return self.finish(seq_id, FinishReason.ABORT)

    def check_integrity(self) -> None:
        """Recount sequences and blocks. Raises AssertionError when something was lost or is held twice."""
        self._ledger.check_integrity()
        assert self._ledger.num_sequences == len(self._running), "blocks without a running sequence"
        known = [sequence.seq_id for sequence in self._waiting] + list(self._running)
        assert sorted(known) == sorted(self._known), "a sequence is lost or in two states"
        for seq_id, sequence in self._running.items():
            # Between plan and commit the planned sequences have a block for the token being fed already.
            spare = self._ledger.table(seq_id).capacity - (sequence.num_tokens - 1)
            assert 0 <= spare <= self._ledger.block_size, (
                f"sequence {seq_id} has {spare} unused token slots"
            )

    def _plan_prefills(self, now: float) -> list[PrefillItem]:
        items: list[PrefillItem] = []
        num_tokens = 0
        while self._waiting and len(self._running) < self._config.max_running:
            sequence = self._waiting[0]
            if items and num_tokens + sequence.num_tokens > self._config.max_prefill_tokens:
                break
            # One free block for each running sequence: without it the newcomer would soon be preempted.
            table = self._ledger.admit(
                sequence.seq_id, sequence.num_tokens, spare_blocks=len(self._running)
            )
            if table is None:
                break
            self._waiting.popleft()
            self._running[sequence.seq_id] = sequence
            if sequence.scheduled_time is None:
                sequence.scheduled_time = now
            num_tokens += sequence.num_tokens
            items.append(_prefill_item(sequence, table))
        return items

    def _plan_decodes(self) -> list[DecodeItem]:
        assert self._running, "sequences wait for an empty KV cache"
        items = []
        # Oldest first, so that it is never preempted for a younger one.
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
        return items

    def _grow_or_preempt(self, seq_id: int) -> tuple[int, int] | None:
        """A new block, taken from the youngest if need be; None when `seq_id` itself is the youngest."""
        while True:
            new_block = self._ledger.grow(seq_id)
            if new_block is not None:
                return new_block
            # Alone in the cache a sequence always finds a block: `Limits.max_len` ends it before.
            assert len(self._running) > 1, f"sequence {seq_id} outgrew the KV cache"
            youngest = next(reversed(self._running))
            self._preempt(self._running[youngest])
            if youngest == seq_id:
                return None

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.num_preemptions += 1
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.seq_id]
        self._ledger.release(sequence.seq_id)
        self._released.append(sequence.seq_id)

    def _check_when_idle(self) -> None:
        if self._idle_checked:
            return
        self.check_integrity()
        assert self._ledger.num_free == self._ledger.num_blocks, "KV cache blocks leaked"
        self._idle_checked = True


def _prefill_item(sequence: Sequence, table: BlockTable) -> PrefillItem:
    # Copies: the plan must not change when the sequence grows.
    return PrefillItem(
        sequence.seq_id,
        sequence.prompt_token_ids + sequence.output_token_ids,
        len(sequence.prompt_token_ids),
        list(table.ranks),
        list(table.block_ids),
        sequence.params,
        sequence.seed,
        start=0,
        end=sequence.num_tokens,
    )
