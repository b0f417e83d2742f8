"""Seconds of exact attention over SP ranks by each transport, for steps with equal shares.

Bytes, calls, merges and copies are the planner's counts (`attention.planner.traffic`,
`exact_counts`), and so is the overlap (`overlap.exact_layer`). With equal shares they are linear in
a step's new and cached tokens, so they are counted twice, when a cost is made, and never again: a
step then costs a few multiplications, on any number of ranks. Calls, merges and copies take what
was measured of the hardware, nothing where nobody measured. Merges are a term of their own, which
nothing hides. A step of `auto` takes the fastest transport, as in the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sps2_mega.attention.layout.heads import most_kv_heads
from sps2_mega.attention.pipeline.micro_batches import Cut
from sps2_mega.attention.planner.exact import handling_s
from sps2_mega.attention.planner.exact_counts import attention_steps, layer_cut
from sps2_mega.attention.planner.link_time import by_cargo, link_seconds, message_seconds
from sps2_mega.attention.planner.overlap import (
    WHOLE,
    LayerSeconds,
    TravelSeconds,
    exact_layer,
)
from sps2_mega.attention.planner.step_shape import StepShape
from sps2_mega.attention.planner.traffic import bytes_moved
from sps2_mega.parallel.machine import Link, Machine
from sps2_mega.simulator.compute import attention_s, memory_s
from sps2_mega.simulator.hardware import Hardware

_UNIT = 1024  # tokens per rank of the counted steps; so many that no integer is rounded
# In zigzag, queries lie in two runs on each rank, and meet one or two runs of every rank's keys.
_CALLS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSeconds:
    """One layer: attention, communication in all and the part that is not hidden, and merges."""

    transport: str
    compute_s: float
    comm_s: float
    exposed_s: float
    merge_s: float = 0.0

    @classmethod
    def of(cls, transport: str, layer: LayerSeconds, *, merge_s: float = 0.0) -> AttentionSeconds:
        return cls(
            transport=transport,
            compute_s=layer.compute_s,
            comm_s=layer.comm_s,
            exposed_s=layer.exposed_s,
            merge_s=merge_s,
        )

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s + self.merge_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportCost:
    """One transport on one machine, per token of each rank.

    `query_s[l]` and `key_s[l]` are link seconds of level l, `sent` bytes of a rank, `copy_s`
    seconds of copying, `merged_rows` partials of a query that are merged. `busiest_share` is the
    part of all (query, key, head) triples that the busiest rank computes, in `calls` calls;
    `most_kv_heads` are the KV heads of the rank that has most where heads are dealt.
    """

    transport: str
    size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    messages: TravelSeconds
    busiest_share: float
    calls: int
    merged_rows: float
    most_kv_heads: int
    query_s: tuple[float, ...]
    key_s: tuple[float, ...]
    query_sent: float
    key_sent: float
    query_copy_s: float
    key_copy_s: float
    on_cpu: bool

    def seconds(
        self, pairs: float, new: float, keys: float, hardware: Hardware, *, pipelined: bool
    ) -> AttentionSeconds:
        """One layer of a step of `new` tokens with `keys` tokens in all, cached ones included.

        `pairs` are the step's (query, key) pairs of one head.
        """
        queries, held = new / self.size, keys / self.size
        kv_bytes = 2 * held * self.num_kv_heads * self.head_dim * self.itemsize
        own = pairs * self.num_heads * self.busiest_share
        compute_s = attention_s(own, self.head_dim, kv_bytes, hardware) + hardware.call_s
        if self.size == 1:
            alone = LayerSeconds(total_s=compute_s, compute_s=compute_s, comm_s=0.0)
            return AttentionSeconds.of(self.transport, alone)
        cut = self._cut(pairs, queries, held) if pipelined else WHOLE
        parts = cut.head_groups * cut.query_parts
        compute_s += queries * self.query_copy_s + held * self.key_copy_s
        compute_s += (self.calls * parts - 1) * hardware.call_s
        steps = self.size if self.transport == "ring" else 1
        layer = exact_layer(
            self.transport,
            cut,
            self._travel(queries, held, hardware, pipelined=pipelined),
            self.messages,
            [compute_s / steps] * steps,
            on_cpu=self.on_cpu,
            pipelined=pipelined,
        )
        merge_s = self.merging_s(queries, self.merged_rows, hardware)
        return AttentionSeconds.of(self.transport, layer, merge_s=merge_s)

    def merging_s(self, queries: float, times: float, hardware: Hardware) -> float:
        """Seconds of merging `times` partials of each query into a float32 sum."""
        return times * queries * self.num_heads * self.head_dim * merge_s(self.itemsize, hardware)

    def _travel(
        self, queries: float, held: float, hardware: Hardware, *, pipelined: bool
    ) -> TravelSeconds:
        travel = by_cargo(
            self.transport,
            queries_s=max(queries * s for s in self.query_s),
            total_s=max(
                queries * q + held * k for q, k in zip(self.query_s, self.key_s, strict=True)
            ),
        )
        if self.transport not in ("ulysses", "pass_q"):
            return travel
        # All-to-alls between all ranks take longer than the link's rate says.
        factor = hardware.stream_factor if pipelined else hardware.exchange_factor
        return TravelSeconds(
            keys_s=travel.keys_s * factor,
            queries_s=travel.queries_s * factor,
            results_s=travel.results_s * factor,
        )

    def _cut(self, pairs: float, queries: float, held: float) -> Cut:
        return layer_cut(
            self.transport,
            num_bytes=int(queries * self.query_sent + held * self.key_sent),
            flops=int(4 * self.head_dim * pairs * self.num_heads / self.size),
            num_kv_heads=self.num_kv_heads,
            most_kv_heads=self.most_kv_heads,
            query_tokens=int(queries),
            on_cpu=self.on_cpu,
        )


def merge_s(itemsize: int, hardware: Hardware) -> float:
    """Seconds of merging, per number of a partial: as measured, or what memory needs."""
    return hardware.merge_s or memory_s(itemsize + 8, hardware)


def transport_costs(
    names: Sequence[str],
    machine: Machine,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
) -> tuple[TransportCost, ...]:
    """Cost of each named transport (of `planner.exact.TRANSPORTS`); heads are of one TP rank."""
    size = math.prod(machine.sp_levels)
    heads = dict(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, itemsize=itemsize
    )
    costs = []
    for name in names:
        whole = _shape(heads, size, _UNIT, _UNIT)
        steps = attention_steps(name, whole)
        query_s, query_sent, query_copy_s = _per_token(name, heads, machine, _UNIT, 0)
        key_s, key_sent, key_copy_s = _per_token(name, heads, machine, 0, _UNIT)
        costs.append(
            TransportCost(
                transport=name,
                size=size,
                messages=message_seconds(name, size, machine),
                busiest_share=sum(step.pairs for step in steps)
                / (sum(map(sum, whole.pairs)) * num_heads),
                calls=sum(step.calls for step in steps),
                merged_rows=sum(step.merged_rows for step in steps) / _UNIT,
                most_kv_heads=most_kv_heads(num_heads, num_kv_heads, size),
                query_s=query_s,
                key_s=key_s,
                query_sent=query_sent,
                key_sent=key_sent,
                query_copy_s=query_copy_s,
                key_copy_s=key_copy_s,
                on_cpu=machine.on_cpu,
                **heads,
            )
        )
    return tuple(costs)


def fastest(
    costs: Sequence[TransportCost],
    pairs: float,
    new: float,
    keys: float,
    hardware: Hardware,
    *,
    pipelined: bool,
) -> AttentionSeconds:
    """One layer by the transport that `--transport auto` takes."""
    found = [cost.seconds(pairs, new, keys, hardware, pipelined=pipelined) for cost in costs]
    return min(found, key=lambda seconds: seconds.total_s)


def _per_token(
    name: str, heads: dict[str, int], machine: Machine, queries: int, keys: int
) -> tuple[tuple[float, ...], float, float]:
    """(link seconds by level, bytes sent by a rank, seconds of copying) per token of each rank."""
    shape = _shape(heads, math.prod(machine.sp_levels), queries, keys)
    moved = bytes_moved(name, shape)
    seconds = []
    for level in range(len(machine.links)):
        # Only this level's link takes time.
        links = tuple(
            link if at == level else Link(latency_s=0.0, bytes_per_s=math.inf)
            for at, link in enumerate(machine.links)
        )
        alone = Machine(sp_levels=machine.sp_levels, links=links, flops_per_s=1.0)
        seconds.append(link_seconds(moved, alone) / _UNIT)
    copy_s = handling_s(name, shape, moved, machine) / _UNIT
    return tuple(seconds), max(map(sum, moved)) / _UNIT, copy_s


def _shape(heads: dict[str, int], size: int, queries: int, keys: int) -> StepShape:
    """A step of equal shares."""
    return StepShape(
        queries=(queries,) * size,
        keys=(keys,) * size,
        pairs=((_UNIT,) * size,) * size,
        calls=((_CALLS,) * size,) * size,
        partial_rows=((queries,) * size,) * size,
        num_heads=heads["num_heads"],
        num_kv_heads=heads["num_kv_heads"],
        head_dim=heads["head_dim"],
        itemsize=heads["itemsize"],
    )
