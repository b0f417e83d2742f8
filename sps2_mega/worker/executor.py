"""One rank's part of a step: inputs, model, sampling.

A prefill pass may take several steps, a few layers each; between them it waits here while other
steps run. Every rank runs the same plans in the same order, so every rank knows which rows each
rank samples and no sizes are exchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from sps2_mega.attention.build import PrefillSetup
from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.attention.pipeline.executor import plain_pipeline
from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.config import ModelConfig
from sps2_mega.kernels.backend import Backend, choose
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.mcore.gpt import GPT
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.weight_placement import WeightPlacement
from sps2_mega.types import (
    DecodeItem,
    ForwardMode,
    PrefillItem,
    StepOutput,
    StepPlan,
)
from sps2_mega.worker.batching import (
    StepInput,
    decode_input,
    decode_tokens,
    hybrid_input,
    prefill_input,
)
from sps2_mega.worker.decode_graphs import DecodeGraphs
from sps2_mega.worker.prefill_pass import Pass
from sps2_mega.worker.running_sequences import RunningSequences
from sps2_mega.worker.sampling.prompt_logprobs import compute_prompt_logprobs
from sps2_mega.worker.sampling.sampler import Drawn
from sps2_mega.worker.sampling.token_exchange import sample_step


@dataclass(frozen=True, slots=True)
class Launched:
    """A decode step that the device is running; `Executor.finish` waits for it."""

    plan: StepPlan
    drawn: Drawn


class Executor:
    """Executor of StepPlans on this rank, with the rank's share of all running sequences.

    Public attributes are the constructor's arguments, not to be changed, and `prefill_comm`: this
    rank's communication in the last step that had prefills.
    """

    def __init__(
        self,
        model: GPT,
        config: ModelConfig,
        pool: KVPool,
        groups: ParallelGroups,
        *,
        prefill: PrefillSetup,
        sparse_decode: bool = False,
        graphs: DecodeGraphs | None = None,
        placement: WeightPlacement | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Set up tables and sampling states for no sequences.

        Args:
            model: this rank's part, with weights.
            config: of the model.
            pool: this rank's share of the KV cache.
            groups: of this rank.
            prefill: transport, planner and pipeline of prefill attention.
            sparse_decode: whether new tokens attend by CSA's pattern, where prefill does.
            graphs: captured decode steps, where they can be captured.
            placement: of feed-forward and output layers; by default each rank computes its rows.
            dtype: of activations.
            device: of all tensors.
        """
        self.model, self.config, self.pool, self.groups = model, config, pool, groups
        self.dtype, self.device = dtype, device
        self.pipeline = prefill.pipeline or plain_pipeline(device)
        self.prefill = replace(prefill, pipeline=self.pipeline)
        self.prefill_comm = CommSeconds()
        self._graphs = graphs
        self.placement = placement or WeightPlacement()
        self._running = RunningSequences(
            config,
            pool,
            groups.sp,
            sparse=prefill.sparse if sparse_decode else None,
            # Captured graphs and our own kernels read block tables on the device.
            on_device=graphs is not None or choose(device, None) is Backend.TRITON,
            device=device,
        )
        self._suspended: dict[int, Pass] = {}

    def with_attention(
        self, transport: str, sparse: SparsePrefill | None, *, sparse_decode: bool = False
    ) -> Executor:
        """Executor on the same weights and cache that attends otherwise, without any sequences.

        Both write to the same blocks: one works while the other is idle.
        """
        return Executor(
            self.model,
            self.config,
            self.pool,
            self.groups,
            prefill=replace(self.prefill, transport=transport, sparse=sparse),
            sparse_decode=sparse_decode,
            placement=self.placement,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def execute(
        self, plan: StepPlan, *, on_layer: Callable[[int], None] | None = None
    ) -> StepOutput:
        """Run a step. All ranks return the same output, one entry per sequence in `plan.sampled`.

        `on_layer` is called for each layer of a pass that begins here, when the cache has the
        layer's new keys and values.
        """
        if on_layer is None and self.can_launch(plan):
            return self.finish(self.launch(plan))
        self._drop(plan)
        began = time.perf_counter()
        passing = self._pass_of(plan, on_layer)
        end = self.model.num_layers if plan.layers is None else plan.layers.end
        passing.advance(self.model, plan.layers)
        if end == self.model.num_layers:
            output = self._complete(plan, passing)
        else:
            assert plan.layers is not None, "a whole pass ends with the last layer"
            self._suspended[plan.layers.pass_id] = passing
            if self.device.type == "cuda":
                # Nothing else waits for a slice, and its seconds decide how many layers the next
                # one may have.
                torch.cuda.current_stream(self.device).synchronize()
            output = StepOutput([], [])
        if passing.prefills:
            num_tokens = sum(item.num_new_tokens for item in passing.prefills)
            name = f"prefill {plan.step}"
            self.prefill_comm = self.pipeline.end_step(name, began, num_tokens=num_tokens)
        return output

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps are captured graphs, which are launched at once."""
        return self._graphs is not None

    def can_launch(self, plan: StepPlan) -> bool:
        """Whether `launch` takes the plan: a decode step of one rank, as a captured graph."""
        return self._graphs is not None and plan.mode is ForwardMode.DECODE

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Start a step, and return while the device works. The next one can be started when this
        one is finished."""
        assert self._graphs is not None and self._running.device_tables is not None
        self._drop(plan)
        self._running.sampling.note_chosen(plan.decodes)
        new = decode_tokens(
            plan.decodes, self._running.tables, self.groups.sp, block_size=self.pool.block_size
        )
        rows_B, *ranges = new.ranges(self._running.tables, self.config.sliding_window)
        logits_RV = self._graphs.logits(
            np.array([new.tokens, new.positions, new.slots, rows_B, *ranges]),
            self._running.device_tables.table(rows_B),
            longest=self._running.tables.longest(rows_B),
        )
        ends = [item.position + 1 for item in plan.decodes]
        return Launched(plan, self._running.sampling.draw(logits_RV, plan.sampled, ends))

    @torch.inference_mode()
    def finish(self, launched: Launched) -> StepOutput:
        """Tokens of a launched step; waits for the device."""
        output = StepOutput(*launched.drawn.tokens())
        if None in output.token_ids:
            self._running.clear_failed(launched.plan, [], output)
        return output

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Drop the state of sequences that are over, or that will be prefilled again."""
        self._running.forget(seq_ids)

    def enter(self, item: PrefillItem) -> None:
        """Add a sequence whose tokens other ranks have prefilled: all are in its blocks, and it
        decodes from now on."""
        self._running.enter(item)

    def _pass_of(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Pass:
        """The suspended pass that this step continues, or a new one."""
        if plan.layers is not None and not plan.layers.begins:
            passing = self._suspended.pop(plan.layers.pass_id)
            assert passing.run.next_layer == plan.layers.first, (
                f"pass {plan.layers.pass_id} stands at layer {passing.run.next_layer}, "
                f"the plan goes on at {plan.layers.first}"
            )
            return passing
        parts = []
        chunked = plan.layers is not None and plan.layers.chunked
        if plan.prefills:
            parts.append(self._prefill_input(plan.prefills, chunked=chunked))
        if plan.decodes:
            parts.append(self._decode_input(plan.decodes))
        step = parts[0] if len(parts) == 1 else hybrid_input(*parts)
        sliced = not chunked and self.placement.sliced_layers(step.tokens_by_rank)
        return Pass.begin(self.model, plan.prefills, step, on_layer, sliced=sliced)

    def _complete(self, plan: StepPlan, passing: Pass) -> StepOutput:
        """Finish a pass after its last layer, with a token for each sequence that is complete."""
        hidden = self.model.finish(passing.run)
        rows = [len(items) for items in passing.step.items_by_rank]
        logits_RV = self.model.logits(
            hidden.index_select(0, passing.step.rows_R),
            rows if self.placement.sliced_output(rows) else None,
        )
        ends = {item.seq_id: item.end for item in passing.prefills}
        ends |= {item.seq_id: item.position + 1 for item in plan.decodes}
        sampled = plan.sampled
        output = sample_step(
            self._running.sampling,
            logits_RV,
            passing.step.items_by_rank,
            sampled,
            [ends[seq_id] for seq_id in sampled],
            self.groups,
        )
        if None in output.token_ids:
            self._running.clear_failed(plan, passing.prefills, output)
        prompt_logprobs = compute_prompt_logprobs(
            self.model, hidden, passing.prefills, self.groups, block_size=self.pool.block_size
        )
        return replace(output, prompt_logprobs=prompt_logprobs) if prompt_logprobs else output

    def _prefill_input(self, items: list[PrefillItem], *, chunked: bool) -> StepInput:
        for item in items:
            if item.samples:
                self._running.add(item, self.prefill.pattern_of)
        return prefill_input(
            items,
            self._running.tables,
            self.pool,
            self.groups.sp,
            self.prefill,
            device=self.device,
            chunked=chunked,
        )

    def _decode_input(self, items: list[DecodeItem]) -> StepInput:
        self._running.sampling.note_chosen(items)
        return decode_input(
            items,
            self._running.tables,
            self.pool,
            self.groups.sp,
            window=self.config.sliding_window,
            dtype=self.dtype,
            device=self.device,
            sparse_tables=self._running.sparse_tables,
            device_tables=self._running.device_tables,
        )

    def _drop(self, plan: StepPlan) -> None:
        """Forget what the plan lists as over, before anything else of it."""
        for pass_id in plan.dropped:
            del self._suspended[pass_id]
        self.forget(plan.released)
