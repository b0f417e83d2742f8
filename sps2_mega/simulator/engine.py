"""One simulated engine: the real scheduler, with a clock in place of a model.

The scheduler plans, `StepCost` says how long a step takes, and every planned sequence gets a token.
"""

from __future__ import annotations

import dataclasses

from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.attention.planner.attention_choice import prompt_layout
from sps2_mega.config import SchedulerConfig
from sps2_mega.errors import ConfigError, Refusal
from sps2_mega.kv_cache.block_chain import chain_root
from sps2_mega.metrics import StepMeter
from sps2_mega.scheduler.scheduler import Scheduler
from sps2_mega.simulator.arrivals import VOCAB_SIZE
from sps2_mega.simulator.prompt import Prompt
from sps2_mega.simulator.step_cost import StepCost, Terms
from sps2_mega.types import DecodeItem, PrefillItem, Sequence, StepOutput, StepPlan

# Tokens; four of the engine's blocks, which changes little here and quarters the bookkeeping.
BLOCK_SIZE = 64
_MEMORY_FRACTION = 0.85  # of what weights leave, as CacheConfig's default


class SimulatedEngine:
    """At most one step is under way; `start_step` and `finish_step` alternate."""

    def __init__(
        self,
        cost: StepCost,
        config: SchedulerConfig,
        *,
        max_model_len: int,
        receives: bool = False,
    ) -> None:
        """With `receives`, prompts were prefilled elsewhere and arrive with their keys and values.

        Raises:
            ConfigError: the weights do not fit the GPUs.
        """
        self.cost, self._receives = cost, receives
        self.num_blocks = kv_blocks(cost)
        csa, prefix_caching = cost.system.csa, cost.system.prefix_caching
        spans = None
        if cost.sparse is not None and prefix_caching:
            sparse = SparsePrefill(
                csa=csa,
                sp_levels=cost.hardware.sp_machine(cost.tp, cost.sp).sp_levels,
                kv_heads=range(1),
                block_size=BLOCK_SIZE,
            )
            spans = sparse.pattern
        self.scheduler = Scheduler(
            config,
            block_size=BLOCK_SIZE,
            num_blocks=self.num_blocks,
            sp_size=cost.sp,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            layout=prompt_layout("auto", csa),
            prefix_root=chain_root(csa) if prefix_caching else None,
            topology_spans=None if spans is None else lambda length: spans(length).spans,
            layer_flops=cost.size.layer_flops,
        )
        self.meter = StepMeter()
        self.terms: dict[str, float] = {}
        self.busy_s = 0.0
        self.peak_kv_usage = 0.0
        self.load_tokens = 0
        self.plan: StepPlan | None = None
        self._seconds = 0.0
        self._passes: dict[int, list[PrefillItem]] = {}  # suspended between layers

    def add(self, sequence: Sequence) -> Refusal | None:
        refusal = self.scheduler.add(sequence)
        if refusal is None:
            self.load_tokens += len(sequence.prompt_token_ids) + sequence.max_tokens
        return refusal

    def start_step(self, now: float) -> float | None:
        """Start the next step and return its end; None when there is nothing to do."""
        assert self.plan is None, "a step is under way"
        if not self.scheduler.has_work:
            return None  # an idle scheduler would recount all blocks, every time
        self.plan = self.scheduler.plan(now)
        if self.plan is None:
            return None
        terms = self._terms(self.plan)
        for name, seconds in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + seconds
        self._seconds = sum(terms.values())
        self.busy_s += self._seconds
        # Between these steps blocks are only given back.
        if self.plan.prefills or any(item.new_block is not None for item in self.plan.decodes):
            self.peak_kv_usage = max(self.peak_kv_usage, self.scheduler.kv_usage)
        return now + self._seconds

    def finish_step(self, now: float) -> list[Sequence]:
        """End the step under way and return the sequences that are finished with it."""
        plan, self.plan = self.plan, None
        assert plan is not None, "no step is under way"
        count = len(plan.sampled)
        finished = self.scheduler.commit(plan, StepOutput([0] * count, [None] * count), now)
        self.meter.record(
            prompt_tokens=self._prompt_tokens(plan),
            output_tokens=count,
            seconds=self._seconds,
        )
        if plan.layers is not None and plan.layers.end == self.cost.size.num_layers:
            del self._passes[plan.layers.pass_id]
        for sequence in finished:
            self.load_tokens -= len(sequence.prompt_token_ids) + sequence.max_tokens
        return finished

    def _terms(self, plan: StepPlan) -> Terms:
        """Terms of the step; layers of a sliced pass cost the same, the last slice has the head."""
        for pass_id in plan.dropped:
            del self._passes[pass_id]
        if plan.layers is None:
            return self.cost.of_plan(self._computed(plan))
        items = self._passes.setdefault(plan.layers.pass_id, plan.prefills)
        num_sampled = len(plan.layers.sampled)
        if plan.layers.chunked:
            (item,) = items
            chunks = plan.layers.chunks(item.start, item.end)
            return self.cost.of_chunks(
                [(start, end) for _, start, end in chunks],
                first=item.start,
                num_sampled=num_sampled,
            )
        return self.cost.of_slice(
            [Prompt(start=item.start, end=item.end) for item in items],
            num_layers=plan.layers.end - plan.layers.first,
            num_sampled=num_sampled,
        )

    def _prompt_tokens(self, plan: StepPlan) -> int:
        """Prompt tokens of the step; slices of a pass count by layers and add up to its tokens."""
        if plan.layers is None:
            return sum(item.num_new_tokens for item in self._computed(plan).prefills)
        items, num_layers = self._passes[plan.layers.pass_id], self.cost.size.num_layers
        count, start = sum(item.num_new_tokens for item in items), items[0].start

        def done(layer: int, token: int) -> int:
            return (count * layer + max(0, token - start)) // num_layers

        first = done(plan.layers.first, plan.layers.first_token)
        return done(plan.layers.end, plan.layers.end_token) - first

    def _computed(self, plan: StepPlan) -> StepPlan:
        """The plan as the model sees it: a prompt that brings its keys and values is a decode.

        After a preemption they are gone, and the prompt is computed here.
        """
        if not self._receives:
            return plan
        there = [i for i in plan.prefills if len(i.token_ids) == i.num_prompt_tokens]
        arrived = [DecodeItem(i.seq_id, i.token_ids[-1], i.end - 1, None) for i in there]
        again = [i for i in plan.prefills if len(i.token_ids) > i.num_prompt_tokens]
        return dataclasses.replace(plan, prefills=again, decodes=[*plan.decodes, *arrived])


def kv_blocks(cost: StepCost) -> int:
    """KV cache blocks of each SP rank.

    Raises:
        ConfigError: the weights leave no room.
    """
    weights = cost.size.weight_bytes / cost.tp
    free = (cost.hardware.memory_bytes - weights) * _MEMORY_FRACTION
    token = cost.size.num_layers * cost.size.kv_bytes(cost.tp) / cost.system.dcp
    blocks = int(free / (token * BLOCK_SIZE))
    if blocks < 1:
        raise ConfigError(
            f"{weights / 1e9:.1f} GB of weights per GPU (tp={cost.tp}) leave no room for a KV "
            "cache in "
            f"{cost.hardware.memory_bytes / 1e9:.0f} GB"
        )
    return blocks


def scheduler_config(cost: StepCost) -> SchedulerConfig:
    """Scheduler settings of a system."""
    system = cost.system
    return SchedulerConfig(
        policy=system.policy,
        chunk_tokens=system.chunk_tokens,
        max_running=system.max_running,
        max_prefill_tokens=system.max_prefill_tokens,
        tbt_target_ms=system.tbt_target_ms,
    )
