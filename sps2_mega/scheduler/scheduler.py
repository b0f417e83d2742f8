"""Continuous batching: what the next step prefills and decodes.

Decides whose turn it is, by one of two policies: prefills before decodes, giving way between layers
where there is a target for the time between tokens; or chunks of prompts together with decodes.
Other decisions live elsewhere: grouping and order of prompts (`prefill_queue`), filling of hybrid
steps (`hybrid_steps`), blocks (`prompt_placement`, `kv_cache`), prefixes (`prefix_sharing`),
refusal and end (`admission`). Pure Python without a clock or torch, so a simulator drives the same
class.

    sps2               prefill A, B | decode A B | prefill C | decode A B C | ...
    sps2 with target   prefill A, B | decode A B | layers 0-3 of C | decode A B | layers 3-6 ...
    sarathi            A, part of B | decode A + rest of B | decode A B + part of C | ...
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sps2_mega.config import SchedulerConfig
from sps2_mega.errors import Refusal
from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.kv_cache.placement import Layout
from sps2_mega.scheduler.admission import Limits, finish_reason, refusal
from sps2_mega.scheduler.decode_steps import DecodeSteps
from sps2_mega.scheduler.hybrid_steps import HybridSteps
from sps2_mega.scheduler.layer_flops import LayerFlops
from sps2_mega.scheduler.prefill_queue import PrefillQueue
from sps2_mega.scheduler.prefix_sharing import PrefixSharing
from sps2_mega.scheduler.prompt_placement import PromptPlacement
from sps2_mega.scheduler.sequence_states import SequenceStates
from sps2_mega.scheduler.step_times import StepTimeModel
from sps2_mega.types import (
    DecodeItem,
    FinishReason,
    ForwardMode,
    LayerSlice,
    PrefillItem,
    Sequence,
    StepOutput,
    StepPlan,
)

# Least time of a prefill slice, as a share of a decode step, whatever the target. Otherwise prompts
# would hardly advance where decode steps take as long as the target.
_LEAST_SHARE = 0.5


class Scheduler:
    """`plan` and `commit` alternate; `add`, `finish` and `abort` may be called at any time.

    Blocks of a dropped sequence are reused at once: ranks execute plans in order, and forget what a
    plan lists as `released` or `dropped` before they execute it. But blocks that later slices of a
    pass write to are kept until then.
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
        layer_flops: LayerFlops | None = None,
        crowd_threshold: int = 0,
    ) -> None:
        """Set up an empty scheduler.

        Args:
            config: policy, limits and targets; an `sp_threshold` of None counts as 0 here.
            block_size: tokens per block.
            num_blocks: blocks per SP rank.
            sp_size: number of SP ranks.
            max_model_len: longest prompt plus output, in tokens.
            vocab_size: token ids at or above it are refused.
            eos_token_ids: tokens that end a sequence.
            layout: spread of a whole prompt over SP ranks, as the transport prefers it.
            prefix_root: enables prefix caching (`block_chain.chain_root`).
            topology_spans: CSA spans of a prompt length where they follow from the topology.
            layer_flops: needed with a target for the time between tokens.
            crowd_threshold: `sp_threshold` where several prompts arrive together.
        """
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
        self._target_s = config.tbt_target_s
        assert self._target_s is None or layer_flops is not None, (
            "a TBT target needs the FLOPs of a layer"
        )
        self._step_times = (
            None if self._target_s is None or layer_flops is None else StepTimeModel(layer_flops)
        )
        self._states = SequenceStates(self._ledger, sharing)
        placement = PromptPlacement(self._ledger, config.sp_threshold or 0, crowd_threshold)
        self._prefills = PrefillQueue(config, self._states, placement, self._step_times)
        self._decodes = DecodeSteps(self._states, self._ledger, self._prefills)
        self._hybrids = HybridSteps(config, self._states, self._decodes)
        self._planned: list[Sequence | None] | None = None
        self._planned_at = 0.0
        self._decode_is_due = False  # a slice of a prefill ran since the last decode step
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
        """Share of the KV cache blocks of all SP ranks that running sequences use, in [0, 1]."""
        return 1.0 - self._ledger.num_free / max(1, self._ledger.num_blocks)

    @property
    def kv_used_per_rank(self) -> tuple[int, ...]:
        """KV cache blocks of each SP rank that running sequences use."""
        return self._ledger.used_per_rank

    @property
    def limits(self) -> Limits:
        """Limits of every sequence; they never change."""
        return self._limits

    def expected_prefill_s(self, num_tokens: int) -> float:
        """Expected seconds of a whole prompt.

        0 before anything was measured, and without a target for the time between tokens, since
        seconds are learnt for it alone.
        """
        return 0.0 if self._step_times is None else self._step_times.prompt_s(0, num_tokens)

    def add(self, sequence: Sequence) -> Refusal | None:
        """Queue a sequence, or refuse it. Only the scheduler changes it from now on."""
        if sequence.seq_id in self._states or self._states.is_held(sequence.seq_id):
            return Refusal.DUPLICATE_ID
        reason = refusal(sequence, self._limits)
        if reason is not None:
            return reason
        max_waiting = self._config.max_waiting
        if max_waiting is not None and self.num_waiting >= max_waiting:
            return Refusal.QUEUE_FULL
        self.queue(sequence)
        return None

    def queue(self, sequence: Sequence) -> None:
        """Queue a sequence that was checked against `limits` and has an id of its own."""
        self._states.add(sequence)

    def plan(self, now: float) -> StepPlan | None:
        """Next step, or None when there is nothing to do. `now` is time.monotonic() in seconds."""
        assert self._planned is None, "plan() came before the last plan was committed"
        if not self.has_work:
            self._check_when_idle()
            return None
        self._idle_checked = False
        layers = None
        if self._chunked:
            prefills, decodes = self._hybrids.plan(now)
        else:
            prefills, layers, decodes = self._plan_separate(now)
        assert prefills or layers or decodes, "sequences wait for an empty KV cache"
        self._step += 1
        mode = ForwardMode.PREFILL if prefills or layers else ForwardMode.DECODE
        if prefills and decodes:
            mode = ForwardMode.HYBRID
        released = self._states.take_released()
        dropped = self._prefills.planned()
        plan = StepPlan(self._step, mode, prefills, decodes, released, layers, dropped)
        self._planned = [self._states.running.get(seq_id) for seq_id in plan.sampled]
        self._planned_at = now
        return plan

    def commit(self, plan: StepPlan, output: StepOutput, now: float) -> list[Sequence]:
        """Append one token per sequence in `plan.sampled`; return the sequences that ended.

        A sequence that wanted no token, only its prompt computed, ends without one. Tokens of
        sequences that were finished or aborted since the plan are dropped. A sequence for which
        there is no token has failed.
        """
        planned, self._planned = self._planned, None
        assert planned is not None and plan.step == self._step, (
            f"step {plan.step} is not the last plan"
        )
        assert len(output.token_ids) == len(output.logprobs) == len(planned), (
            f"{len(planned)} sequences were planned, the output has {len(output.token_ids)} tokens"
        )
        self._learn(plan, now - self._planned_at)
        for seq_id, logprobs in output.prompt_logprobs.items():
            if seq_id in self._states.running:
                self._states.running[seq_id].add_prompt_logprobs(logprobs)
        finished = []
        for sequence, token_id, logprob in zip(
            planned, output.token_ids, output.logprobs, strict=True
        ):
            if sequence is None or self._states.running.get(sequence.seq_id) is not sequence:
                continue
            if token_id is None:
                self.finish(sequence.seq_id, FinishReason.ERROR)
                finished.append(sequence)
                continue
            self._states.cached(sequence)
            sequence.take_token(token_id, logprob, now)
            reason = finish_reason(sequence, self._limits)
            if reason is not None:
                self.finish(sequence.seq_id, reason)
                finished.append(sequence)
        return finished

    def finish(self, seq_id: int, reason: FinishReason) -> bool:
        """End a sequence (the engine found a stop string); False when it is not here."""
        if seq_id not in self._states:
            return False
        self._states.end(seq_id, reason)
        self._prefills.ended(seq_id)
        return True

    def abort(self, seq_id: int) -> bool:
        """End a sequence in any state; False when it is not here (any more)."""
        return self.finish(seq_id, FinishReason.ABORT)

    def check_integrity(self) -> None:
        """Assert that no sequence or block was lost or is held twice."""
        self._states.check_integrity()
        if not self._chunked:
            self._prefills.check_integrity()

    def _plan_separate(
        self, now: float
    ) -> tuple[list[PrefillItem], LayerSlice | None, list[DecodeItem]]:
        """A prefill or a slice of one, else decodes. Decodes never wait for more than one slice."""
        decodes: list[DecodeItem] = []
        if self._decode_is_due:
            decodes = self._decodes.plan()
            self._decode_is_due = False
        if not decodes:
            prefill = self._prefills.next_slice(now, *self._room_s(now))
            if prefill is not None:
                self._decode_is_due = self._target_s is not None
                return *prefill, []
            decodes = self._decodes.plan()
        return [], None, decodes

    def _room_s(self, now: float) -> tuple[float, float]:
        """Seconds for the next slice, and seconds for one layer that is cut into chunks.

        Without running decodes a slice ends after about the target, too, so that short prompts and
        aborts get their turn.
        """
        if self._target_s is None or self._step_times is None:
            return math.inf, math.inf
        decoding = self._states.decoding
        if not decoding:
            return self._target_s, self._target_s
        oldest = min(sequence.token_times[-1] for sequence in decoding)
        least_s = _LEAST_SHARE * self._step_times.decode_mean_s
        layer_room_s = max(self._target_s - self._step_times.decode_s, least_s)
        return oldest + layer_room_s - now, layer_room_s

    def _learn(self, plan: StepPlan, seconds: float) -> None:
        if self._step_times is not None and plan.mode is ForwardMode.DECODE:
            self._step_times.decoded(seconds)
        elif self._step_times is not None:
            self._prefills.executed(seconds)

    def _check_when_idle(self) -> None:
        if not self._idle_checked:
            self.check_integrity()
            assert self._ledger.num_free == self._ledger.num_blocks, "KV cache blocks leaked"
            self._idle_checked = True
