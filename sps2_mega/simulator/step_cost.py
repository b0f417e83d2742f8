"""Seconds of one step of one engine, as named terms: every layer costs the same, and terms add up.

    linear          projections and feed-forward layers            attention     scores and values, or reading the cache
    transport       attention's communication that is not hidden   merge         partials of other ranks
    tp_all_reduce   two per layer, one of the embedding            decode_exchange   queries out, partials back
    kv_write        new keys and values into the cache             overhead      gaps between small kernels
    head            logits of the tokens that are sampled          host        planning, telling ranks, sampling

Decides how a step's tokens are dealt to the ranks of an engine: evenly, or, where that is faster
and the system allows it, short prompts whole on one SP rank each. What is in a step is the
scheduler's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.chunk_cost import chunk_seconds
from sps2_mega.simulator.collectives import all_reduce_s
from sps2_mega.simulator.compute import causal_pairs, gemm_s, kv_read_s, memory_s
from sps2_mega.simulator.decode_cost import DecodeExchange
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.local_prefill import dealt
from sps2_mega.simulator.model_size import ModelSize, model_size
from sps2_mega.simulator.sparse_cost import Prompt, SparseCost, sparse_cost
from sps2_mega.simulator.system import System
from sps2_mega.simulator.transport_cost import (
    AttentionSeconds,
    TransportCost,
    fastest,
    merge_s,
    transport_costs,
)
from sps2_mega.types import StepPlan

Terms = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Prices steps of one engine of `tp` * `sp` GPUs."""

    system: System
    tp: int
    sp: int
    hardware: Hardware
    size: ModelSize
    exact: tuple[TransportCost, ...]
    gather: TransportCost
    exchange: DecodeExchange
    sparse: SparseCost | None
    _decodes: dict[int, dict[str, float]] = field(default_factory=dict, repr=False, compare=False)

    def of_plan(self, plan: StepPlan) -> Terms:
        """A step as the scheduler planned it."""
        return self.of_tokens(
            [Prompt(start=item.start, end=item.end) for item in plan.prefills],
            num_decodes=len(plan.decodes),
            context=sum(item.position for item in plan.decodes) + len(plan.decodes),
            num_sampled=len(plan.sampled),
        )

    def of_tokens(
        self, prompts: Sequence[Prompt], *, num_decodes: int, context: int, num_sampled: int
    ) -> Terms:
        """`prompts` are prefilled; `num_decodes` sequences, with `context` tokens together, get one
        more token."""
        terms = self._of_layers(prompts, num_decodes, context)
        return self._of_step(terms, num_sampled)

    def of_slice(self, prompts: Sequence[Prompt], *, num_layers: int, num_sampled: int) -> Terms:
        """`prompts` go through some of the layers; with the last ones there are tokens to
        sample."""
        share = num_layers / self.size.num_layers
        terms = {name: share * seconds for name, seconds in self._of_layers(prompts, 0, 0).items()}
        return self._of_step(terms, num_sampled)

    def of_chunks(
        self, chunks: Sequence[tuple[int, int]], *, first: int, num_sampled: int
    ) -> Terms:
        """Chunks (start, end) of one prompt, each through one layer; in every layer the one from
        `first` on comes first and brings cached keys too."""
        terms: dict[str, float] = {}
        for start, end in chunks:
            found = chunk_seconds(
                self.gather,
                self.sparse,
                Prompt(start=start, end=end),
                end if start == first else end - start,
                self.hardware,
                pipelined=self.system.pipelined,
            )
            layer = self._per_token((end - start) / self.sp)
            for name, seconds in layer.items():
                terms[name] = terms.get(name, 0.0) + seconds / self.size.num_layers
            for name, seconds in _attention_terms(found):
                terms[name] = terms.get(name, 0.0) + seconds
        return self._of_step(terms, num_sampled)

    def _of_layers(
        self, prompts: Sequence[Prompt], num_decodes: int, context: int
    ) -> dict[str, float]:
        """All layers, with the prompts spread or side by side."""
        new = sum(p.end - p.start for p in prompts)
        terms = self._layers(list(prompts), new / self.sp, num_decodes, context)
        if self.system.elastic and self.sp > 1 and len(prompts) > 1 and not num_decodes:
            apart = self._side_by_side(prompts)
            if apart is not None and sum(apart.values()) < sum(terms.values()):
                terms = apart
        return terms

    def _of_step(self, terms: dict[str, float], num_sampled: int) -> Terms:
        """`terms` of layers, and what comes once in a step; the host's share only where it was
        measured."""
        terms["head"] = gemm_s(
            num_sampled / self.sp,
            self.size.head_params / self.tp,
            self.size.head_params * self.size.itemsize / self.tp,
            self.hardware,
        )
        if self.hardware.step_overhead_s:
            terms["host"] = self.hardware.step_overhead_s
        return terms

    def transport_of(self, prompt_len: int) -> str:
        """The transport that a prompt of this length takes, one per SP level under CSA."""
        return self._prefill_attention([Prompt(start=0, end=prompt_len)]).transport

    def _layers(
        self, prompts: list[Prompt], new: float, num_decodes: int, context: int
    ) -> dict[str, float]:
        """All layers; `new` prompt tokens are on the busiest rank."""
        if not prompts:
            return self._decode(num_decodes, context)
        # A sequence's linear layers run on one rank, so the busiest has at least one whole
        # sequence.
        terms = self._per_token(new + -(-num_decodes // self.sp))
        self._add_prefill_attention(terms, prompts)
        if num_decodes:
            self._add_decode_attention(terms, num_decodes, context)
        return terms

    def _decode(self, num_decodes: int, context: int) -> dict[str, float]:
        """A step without prompts. Most steps are such, and but for reading the cache they differ by
        their number of sequences alone, so that is remembered."""
        terms = self._decodes.get(num_decodes)
        if terms is None:
            terms = self._decodes[num_decodes] = self._per_token(-(-num_decodes // self.sp))
        terms = dict(terms)
        if num_decodes:
            self._add_decode_attention(terms, num_decodes, context)
        return terms

    def _add_decode_attention(
        self, terms: dict[str, float], num_decodes: int, context: int
    ) -> None:
        layers = self.size.num_layers
        read = context * self._kv_bytes / self.sp / self.system.dcp
        reading = kv_read_s(read, self.hardware) + self.hardware.call_s
        terms["attention"] = terms.get("attention", 0.0) + layers * reading
        terms["decode_exchange"] = layers * self.exchange.seconds(num_decodes, context)

    def _per_token(self, rows: float) -> dict[str, float]:
        """What depends on the tokens of the busiest rank alone."""
        size, layers, hardware = self.size, self.size.num_layers, self.hardware
        reduced = all_reduce_s(rows * size.hidden_size * size.itemsize, self.tp, hardware)
        return {
            "linear": layers
            * gemm_s(rows, size.layer_params / self.tp, size.layer_bytes / self.tp, hardware),
            "tp_all_reduce": (2 * layers + 1) * reduced,
            "kv_write": layers * memory_s(rows * self._kv_bytes, hardware),
            "overhead": layers * hardware.layer_overhead_s,
        }

    def _add_prefill_attention(self, terms: dict[str, float], prompts: list[Prompt]) -> None:
        for name, seconds in _attention_terms(self._prefill_attention(prompts)):
            terms[name] = self.size.num_layers * seconds

    def _prefill_attention(self, prompts: list[Prompt]) -> AttentionSeconds:
        """One layer, by the transport that is fastest for these prompts."""
        pipelined = self.system.pipelined
        if self.sparse is not None:
            return self.sparse.seconds(prompts, self.hardware, pipelined=pipelined)
        return fastest(
            self.exact,
            sum(causal_pairs(p.start, p.end) for p in prompts),
            sum(p.end - p.start for p in prompts),
            sum(p.end for p in prompts),
            self.hardware,
            pipelined=pipelined,
        )

    def _side_by_side(self, prompts: Sequence[Prompt]) -> dict[str, float] | None:
        """Whole prompts, each on one rank; None where some are cached."""
        if any(p.start for p in prompts):
            return None
        tokens, attending_s = dealt(
            prompts, tp=self.tp, sp=self.sp, size=self.size, hardware=self.hardware
        )
        terms = self._per_token(tokens)
        terms["attention"] = self.size.num_layers * attending_s
        return terms

    @property
    def _kv_bytes(self) -> int:
        return self.size.kv_bytes(self.tp)


def step_cost(
    system: System,
    model: ModelConfig,
    hardware: Hardware,
    *,
    tp: int,
    sp: int,
    ffn_itemsize: int | None = None,
) -> StepCost:
    """Raises:
    ConfigError: the degrees do not fit nodes or CSA levels, or the model has a sliding window.
    """
    if model.sliding_window is not None:
        raise ConfigError(
            "the simulator prices full attention, the model has a window of "
            f"{model.sliding_window} tokens"
        )
    size = model_size(model, ffn_itemsize=ffn_itemsize)
    machine = hardware.sp_machine(tp, sp)
    heads = dict(
        num_heads=max(1, model.num_heads // tp),
        num_kv_heads=max(1, model.num_kv_heads // tp),
        head_dim=model.head_dim,
        itemsize=size.itemsize,
    )
    sparse = None
    if not system.csa.exact and sp > 1:
        merging = replace(machine, merge_s=merge_s(size.itemsize, hardware))
        sparse = sparse_cost(system.csa, merging, **heads)
    (gather,) = transport_costs(["gather"], machine, **heads)
    exact = transport_costs(system.transports, machine, **heads)
    return StepCost(
        system=system,
        tp=tp,
        sp=sp,
        hardware=hardware,
        size=size,
        exact=exact,
        gather=gather,
        exchange=DecodeExchange(
            system=system, tp=tp, sp=sp, hardware=hardware, size=size, machine=machine
        ),
        sparse=sparse,
    )


def _attention_terms(found: AttentionSeconds) -> tuple[tuple[str, float], ...]:
    """One layer's."""
    return (
        ("attention", found.compute_s),
        ("transport", found.exposed_s),
        ("merge", found.merge_s),
    )
