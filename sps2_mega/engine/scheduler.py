"""What the next step does: continuous batching, first come first served.

Decides which sequences run, wait or are preempted, by one of two policies: whole prompts before decodes, or chunks of
prompts together with decodes (Sarathi-Serve's stall-free batches, arXiv 2403.02310). Does not decide where
blocks go (`kv_cache`), who shares a prefix (`prefix_sharing`), nor when a request is refused or a sequence is
over (`admission`). Pure Python without a clock or torch, so a simulator can drive the very same scheduler.

    sps2      prefill A, B    decode A B    prefill C (all of it)    decode A B C    ...
    sarathi   A, part of B    decode A + rest of B    decode A B + part of C    decode A B + part of C    ...
"""

from __future__ import annotations

from collections.abc import Callable

from sps2_mega.config import SchedulerConfig
from sps2_mega.engine.admission import Limits, finish_reason, refusal
from sps2_mega.engine.prefix_sharing import PrefixSharing
from sps2_mega.engine.sequence_states import SequenceStates
from sps2_mega.errors import Refusal
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
    """`plan` and `commit` alternate; `add`, `finish` and `abort` may come at any time between them.

    Blocks of a dropped sequence are reused at once: ranks execute plans in order, and forget what a plan lists as
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
        prefix_root: bytes | None = None,
        topology_spans: Callable[[int], tuple[int, ...]] | None = None,
    ) -> None:
        """`num_blocks` is per sp rank; `layout` is how a whole prompt is spread, as the transport prefers it.
        `prefix_root` (`block_chain.chain_root`) switches prefix caching on; `topology_spans` gives the CSA spans of a
        prompt length where they come from the ranks."""
        self._config = config
        self._limits = Limits(
            max_model_len=max_model_len,
            cache_tokens=num_blocks * sp_size * block_size,
            vocab_size=vocab_size,
            eos_token_ids=frozenset(eos_token_ids),
        )
        self._chunked = config.policy == "sarathi"
        self._ledger = BlockLedger(
            num_blocks=num_blocks,
            sp_size=sp_size,
            block_size=block_size,
            layout="striped" if self._chunked else layout,
            # A chunk is then about one run of tokens on every rank.
            stripe=max(1, config.chunk_tokens // (block_size * sp_size)),
        )
        sharing = None
        if prefix_root is not None:
            sharing = PrefixSharing(self._ledger, root=prefix_root, topology_spans=topology_spans)
        self._states = SequenceStates(self._ledger, sharing)
        self._planned: list[Sequence] | None = None
        self._step = 0
        self._idle_checked = True

    @property
    def num_waiting(self) -> int:
        return len(self._states.waiting)

    @property
    def num_running(self) -> int:
        return len(self._states.running)

    @property
    def has_work(self) -> bool:
        return len(self._states) > 0

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache blocks of all sp ranks that running sequences use, in [0, 1]."""
        return 1.0 - self._ledger.num_free / max(1, self._ledger.num_blocks)

    @property
    def kv_used_per_rank(self) -> tuple[int, ...]:
        """KV cache blocks of each sp rank that running sequences use."""
        free = self._ledger.free_per_rank
        per_rank = self._ledger.num_blocks // len(free)
        return tuple(per_rank - num_free for num_free in free)

    @property
    def max_len(self) -> int:
        """Longest prompt plus output that can run here, in tokens: the model's limit or the cache's."""
        return self._limits.max_len

    def refusal(self, sequence: Sequence) -> Refusal | None:
        """Why a sequence could never run here, whatever else does; reads nothing that changes."""
        return refusal(sequence, self._limits)

    def add(self, sequence: Sequence) -> Refusal | None:
        """Queue a sequence, or say why not. The scheduler alone changes it from now on."""
        if sequence.seq_id in self._states:
            return Refusal.DUPLICATE_ID
        reason = refusal(sequence, self._limits)
        if reason is not None:
            return reason
        max_waiting = self._config.max_waiting
        if max_waiting is not None and self.num_waiting >= max_waiting:
            return Refusal.QUEUE_FULL
        self._states.add(sequence)
        return None

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to do. `now` is time.monotonic() in seconds."""
        assert self._planned is None, "plan() came before the last plan was committed"
        if not self.has_work:
            self._check_when_idle()
            return None
        self._idle_checked = False
        if self._chunked:
            prefills, decodes = self._plan_hybrid(now)
        else:
            prefills = self._plan_newcomers(now, self._config.max_prefill_tokens)
            decodes = [] if prefills else self._plan_decodes()
        assert prefills or decodes, "sequences wait for an empty KV cache"
        self._step += 1
        mode = ForwardMode.PREFILL if prefills else ForwardMode.DECODE
        if prefills and decodes:
            mode = ForwardMode.HYBRID
        plan = StepPlan(self._step, mode, prefills, decodes, self._states.take_released())
        self._planned = [self._states.running[seq_id] for seq_id in plan.sampled]
        return plan

    def commit(self, plan: StepPlan, output: StepOutput, now: float) -> list[Sequence]:
        """Append one token per sequence in `plan.sampled`; returns the sequences that ended with it.

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
            if self._states.running.get(sequence.seq_id) is not sequence:
                continue
            if token_id is None:
                self.finish(sequence.seq_id, FinishReason.ERROR)
                finished.append(sequence)
                continue
            self._states.cached(sequence)
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
        if seq_id not in self._states:
            return False
        self._states.end(seq_id, reason)
        return True

    def abort(self, seq_id: int) -> bool:
        """End a sequence in any state; False when it is not here (any more)."""
        return self.finish(seq_id, FinishReason.ABORT)

    def check_integrity(self) -> None:
        """Recount sequences and blocks. Raises AssertionError when something was lost or is held twice."""
        self._states.check_integrity()

    def _plan_hybrid(self, now: float) -> tuple[list[PrefillItem], list[DecodeItem]]:
        """All running decodes, and as much of prompts as the step's token budget leaves."""
        num_waiting = self.num_waiting
        decodes = self._plan_decodes()
        preempting = self.num_waiting > num_waiting
        budget = self._config.chunk_tokens - len(decodes)
        items: list[PrefillItem] = []
        for sequence in self._states.prefilling:
            if budget > 0:
                items.append(self._states.next_chunk(sequence, budget))
                budget -= items[-1].num_new_tokens
        if not preempting:
            items += self._plan_newcomers(now, budget)
        return items, decodes

    def _plan_newcomers(self, now: float, budget: int) -> list[PrefillItem]:
        """Prompts in order while `budget` tokens last: chunks of them, or whole ones, the first at any length."""
        items: list[PrefillItem] = []
        waiting, index = self._states.waiting, 0
        while budget > 0 and self.num_running < self._config.max_running:
            if index >= min(len(waiting), self._config.max_running):
                break
            if self._ledger.num_free <= self.num_running:
                break  # no room for one block; not worth looking for a prefix in every step
            prefix = self._states.look_up(waiting[index])
            if prefix is None:
                index += 1  # it comes when its prefix is there; the next one may go ahead
                continue
            missing = waiting[index].num_tokens - len(prefix.blocks) * self._ledger.block_size
            if not self._chunked and items and missing > budget:
                break
            sequence = self._states.admit(index, prefix, now)
            if sequence is None:
                break
            items.append(self._states.next_chunk(sequence, budget if self._chunked else missing))
            budget -= items[-1].num_new_tokens
        return items

    def _plan_decodes(self) -> list[DecodeItem]:
        items = []
        # Oldest first, so that it is never preempted for a younger one.
        for seq_id in list(self._states.running):
            sequence = self._states.running.get(seq_id)
            if sequence is None:
                break  # preempted in this loop, and all that are younger too
            if self._states.is_prefilling(seq_id):
                continue
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
            assert self.num_running > 1, f"sequence {seq_id} outgrew the KV cache"
            if self._states.preempt_youngest() == seq_id:
                return None

    def _check_when_idle(self) -> None:
        if self._idle_checked:
            return
        self.check_integrity()
        assert self._ledger.num_free == self._ledger.num_blocks, "KV cache blocks leaked"
        self._idle_checked = True
