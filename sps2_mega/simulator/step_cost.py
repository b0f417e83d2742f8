"""Seconds of one step of one engine, as named terms: every layer costs the same, and terms add up.

    linear            projections and feed-forward layers
    attention         scores and values, or reading the cache
    transport         attention's communication that is not hidden
    merge             partials of other ranks
    tp_all_reduce     two per layer, one of the embedding
    decode_exchange   queries out, partials back
    kv_write          new keys and values into the cache
    overhead          gaps between small kernels
    head              logits of the tokens that are sampled
    host              planning, telling ranks, sampling

A step's tokens are dealt evenly to the ranks of an engine or, where that is faster and the system
allows it, by local prefill: short prompts whole on one SP rank each. The scheduler decides what is
in a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.chunk_cost import chunk_seconds
from sps2_mega.simulator.collectives import all_reduce_s
from sps2_mega.simulator.compute import gemm_s, kv_read_s, memory_s
from sps2_mega.simulator.decode_cost import DecodeExchange
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.local_prefill import dealt
from sps2_mega.simulator.model_size import ModelSize, model_size
from sps2_mega.simulator.prompt import Prompt
from sps2_mega.simulator.sparse_cost import SparseCost, sparse_cost
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
    """Cost of the steps of one engine of `tp` * `sp` GPUs."""

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
        """Terms of a step as the scheduler planned it."""
        return self.of_tokens(
            [Prompt(start=item.start, end=item.end) for item in plan.prefills],
            num_decodes=len(plan.decodes),
            context=sum(item.position for item in plan.decodes) + len(plan.decodes),
            num_sampled=len(plan.sampled),
        )

    def of_tokens(
        self, prompts: Sequence[Prompt], *, num_decodes: int, context: int, num_sampled: int
    ) -> Terms:
        """Terms of a step that prefills `prompts` and decodes one token of `num_decodes` sequences.

        `context` are the tokens of those sequences together.
        """
        terms = self._of_layers(prompts, num_decodes, context)
        return self._of_step(terms, num_sampled)

    def of_slice(self, prompts: Sequence[Prompt], *, num_layers: int, num_sampled: int) -> Terms:
        """Terms of `prompts` in `num_layers` of the layers; the last slice samples tokens."""
        share = num_layers / self.size.num_layers
        terms = {name: share * seconds for name, seconds in self._of_layers(prompts, 0, 0).items()}
        return self._of_step(terms, num_sampled)

    def of_chunks(
        self, chunks: Sequence[tuple[int, int]], *, first: int, num_sampled: int
    ) -> Terms:
        """Terms of chunks (start, end) of one prompt, each through one layer.

        The chunk that begins at `first` is the first of its layer and brings cached keys too.
        """
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
        """Terms of all layers, with prompts spread over the ranks or prefilled locally."""
        new = sum(p.num_new for p in prompts)
        terms = self._layers(list(prompts), new / self.sp, num_decodes, context)
        if self.system.elastic and self.sp > 1 and len(prompts) > 1 and not num_decodes:
            local = self._local_prefill(prompts)
            if local is not None and sum(local.values()) < sum(terms.values()):
                terms = local
        return terms

    def _of_step(self, terms: dict[str, float], num_sampled: int) -> Terms:
        """Add what each step pays once to the terms of its layers.

        The host's share counts only where it was measured.
        """
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
        """Terms of all layers, with `new` prompt tokens on the busiest rank."""
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
        """Terms of a step without prompts, the most frequent kind.

        But for reading the cache they depend on the number of sequences alone, so that part is
        remembered.
        """
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
        """Terms that depend on the tokens of the busiest rank alone."""
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
            sum(p.pairs for p in prompts),
            sum(p.num_new for p in prompts),
            sum(p.end for p in prompts),
            self.hardware,
            pipelined=pipelined,
        )

    def _local_prefill(self, prompts: Sequence[Prompt]) -> dict[str, float] | None:
        """Terms of whole prompts on one rank each; None where some of them are cached."""
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
    """Cost of the steps of one engine of a system.

    Raises:
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
    """Terms of one layer."""
    return (
        ("attention", found.compute_s),
        ("transport", found.exposed_s),
        ("merge", found.merge_s),
    )
