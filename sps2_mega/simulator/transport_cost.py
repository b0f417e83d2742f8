"""Seconds of exact attention over SP ranks by each transport: the planner's bytes, the pipeline's
order.

Bytes of a step with equal shares are linear in its new and its cached tokens, so
`attention.traffic` is asked twice, when a cost is made, and never again: a step then costs a few
multiplications, on any number of ranks. Layers are cut and windows are as wide as in the transports
themselves; every part of a cut layer pays its own latencies and calls. Calls, merges and copies
cost what was measured of the hardware, nothing where nobody measured. Decides which transport a
step of `auto` takes, as the engine does: the fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sps2_mega.attention.layout.heads import most_kv_heads, split_heads
from sps2_mega.attention.pipeline.settings import (
    CPU_PART,
    CUDA_PART,
    WINDOW,
    Cut,
    PipelineSettings,
    cut_by_heads_and_queries,
    num_micro_batches,
)
from sps2_mega.attention.planner.exact import estimate, link_seconds
from sps2_mega.attention.planner.overlap import cut_s, ring_s
from sps2_mega.attention.planner.step_shape import StepShape
from sps2_mega.attention.planner.traffic import bytes_moved, num_messages
from sps2_mega.parallel.machine import Link, Machine
from sps2_mega.simulator.compute import attention_s, memory_s
from sps2_mega.simulator.hardware import Hardware

_UNIT = (
    1024  # tokens per rank of the steps that are asked for; large enough that no integer is rounded
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSeconds:
    """One layer: what attention computes, what communication takes in all, and how much of that is
    not hidden."""

    transport: str
    compute_s: float
    comm_s: float
    exposed_s: float
    merge_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s + self.merge_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportCost:
    """One transport on one machine. `query_s[l]` and `key_s[l]` are link seconds per token of level
    l, for one token per rank; `sent` is bytes per rank and `copy_s` seconds of copying likewise.
    `most_kv_heads`: where heads are dealt."""

    transport: str
    size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    latency_s: float
    busiest_share: float
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
        """A step of `new` tokens that looks at `keys` tokens (those included), `pairs` of them for
        each head."""
        queries, held = new / self.size, keys / self.size
        kv_bytes = 2 * held * self.num_kv_heads * self.head_dim * self.itemsize
        own = pairs * self.num_heads * self.busiest_share
        compute_s = attention_s(own, self.head_dim, kv_bytes, hardware) + hardware.call_s
        if self.size == 1:
            return AttentionSeconds(
                transport=self.transport, compute_s=compute_s, comm_s=0.0, exposed_s=0.0
            )
        compute_s += queries * self.query_copy_s + held * self.key_copy_s
        query_s = max(queries * s for s in self.query_s)
        link_s = max(queries * q + held * k for q, k in zip(self.query_s, self.key_s, strict=True))
        factor = 1.0
        if self.transport in ("ulysses", "pass_q"):  # all-to-alls between all ranks
            factor = hardware.stream_factor if pipelined else hardware.exchange_factor
        cut = Cut(head_groups=1, query_parts=1)
        if pipelined and self.transport != "ring":
            cut = self._cut(pairs, queries, held)
        parts = cut.head_groups * cut.query_parts
        calls = 2 * self.size if self.transport in ("ring", "pass_q") else 1
        compute_s += (calls * parts - 1) * hardware.call_s
        back_s = query_s / 2 if self.transport in ("ulysses", "pass_q") else 0.0
        for_keys, for_queries, for_results = self._messages()
        messages = cut.head_groups * for_keys + parts * (for_queries + for_results)
        # Between CPUs the latency of a message is time of a core, which no pipeline hides
        # (`attention.planner`).
        latency_s, core_s = (
            (0.0, messages * self.latency_s) if self.on_cpu else (self.latency_s, 0.0)
        )
        keys_s = (link_s - query_s) * factor + cut.head_groups * for_keys * latency_s
        queries_s = (query_s - back_s) * factor + parts * for_queries * latency_s
        back_s = back_s * factor + parts * for_results * latency_s
        comm_s = keys_s + queries_s + back_s
        if not pipelined:
            total = compute_s + comm_s
        elif self.transport == "ring":
            total = ring_s(comm_s / (self.size - 1), [compute_s / self.size] * self.size)
        else:
            window = WINDOW if self.transport == "ulysses" else 1
            total = cut_s(
                cut,
                window,
                keys_s=keys_s,
                queries_s=queries_s,
                compute_s=compute_s,
                back_s=back_s,
            )
        return AttentionSeconds(
            transport=self.transport,
            compute_s=compute_s,
            comm_s=comm_s + core_s,
            exposed_s=total + core_s - compute_s,
            merge_s=self._merge_s(queries, hardware),
        )

    def _messages(self) -> tuple[int, int, int]:
        """Of `num_messages` those with keys, with queries, and with results."""
        count = num_messages(self.transport, self.size)
        if self.transport == "pass_q":
            return 0, count - 1, 1
        return (1, count - 2, 1) if self.transport == "ulysses" else (count, 0, 0)

    def _cut(self, pairs: float, queries: float, held: float) -> Cut:
        """As `attention.ulysses` and `attention.pipeline.parts.kv_head_groups` cut, by means over
        ranks."""
        wanted = num_micro_batches(
            PipelineSettings(),
            num_bytes=int(queries * self.query_sent + held * self.key_sent),
            flops=int(4 * self.head_dim * pairs * self.num_heads / self.size),
            smallest=CPU_PART if self.on_cpu else CUDA_PART,
        )
        if self.transport != "ulysses":
            return Cut(head_groups=min(wanted, self.num_kv_heads), query_parts=1)
        return cut_by_heads_and_queries(
            wanted, kv_heads=self.most_kv_heads, query_tokens=max(1, int(queries))
        )

    def _merge_s(self, queries: float, hardware: Hardware) -> float:
        """Each query meets the keys of every rank; in zigzag two runs of half as many meet one or
        two runs of keys."""
        if self.transport not in ("ring", "pass_q"):
            return 0.0
        return self.merging_s(queries, self.size, hardware)

    def merging_s(self, queries: float, times: int, hardware: Hardware) -> float:
        """So many partials of each query are read and merged into a float32 sum, which is read and
        written."""
        return times * queries * self.num_heads * self.head_dim * merge_s(self.itemsize, hardware)


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
    """One for each name of `attention.planner.TRANSPORTS`; heads are those of one TP rank."""
    size = math.prod(machine.sp_levels)
    heads = dict(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, itemsize=itemsize
    )
    costs = []
    for name in names:
        share = 1.0 / size
        if name == "ulysses" and size > 1:
            shares = split_heads(num_heads, num_kv_heads, size)
            share = max(len(own) for own, _ in shares) / num_heads
        query_s, query_sent = _per_token(name, heads, machine, queries=_UNIT, keys=0)
        key_s, key_sent = _per_token(name, heads, machine, queries=0, keys=_UNIT)
        copy_s = [_copy_s(name, heads, machine, *counts) for counts in ((_UNIT, 0), (0, _UNIT))]
        costs.append(
            TransportCost(
                transport=name,
                size=size,
                latency_s=max(link.latency_s for link in machine.links),
                busiest_share=share,
                most_kv_heads=most_kv_heads(num_heads, num_kv_heads, size),
                query_s=query_s,
                key_s=key_s,
                query_sent=query_sent,
                key_sent=key_sent,
                query_copy_s=copy_s[0],
                key_copy_s=copy_s[1],
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
    """What `--transport auto` takes."""
    found = [cost.seconds(pairs, new, keys, hardware, pipelined=pipelined) for cost in costs]
    return min(found, key=lambda seconds: seconds.total_s)


def _per_token(
    name: str, heads: dict[str, int], machine: Machine, *, queries: int, keys: int
) -> tuple[tuple[float, ...], float]:
    """Link seconds of each level, and bytes sent by a rank, per token of each rank."""
    size = math.prod(machine.sp_levels)
    moved = bytes_moved(name, _shape(heads, size, queries, keys))
    seconds = []
    for level in range(len(machine.links)):
        # Only this level's link takes time.
        links = tuple(
            link if at == level else Link(latency_s=0.0, bytes_per_s=math.inf)
            for at, link in enumerate(machine.links)
        )
        alone = Machine(sp_levels=machine.sp_levels, links=links, flops_per_s=1.0)
        seconds.append(link_seconds(moved, alone) / _UNIT)
    return tuple(seconds), max(map(sum, moved)) / _UNIT


def _copy_s(name: str, heads: dict[str, int], machine: Machine, queries: int, keys: int) -> float:
    """Seconds of copying per token of each rank, as the planner counts it."""
    alone = replace(machine, call_s=0.0, merge_s=0.0)
    shape = _shape(heads, math.prod(machine.sp_levels), queries, keys)
    return estimate(name, shape, alone, overlap=False).compute_s / _UNIT


def _shape(heads: dict[str, int], size: int, queries: int, keys: int) -> StepShape:
    """A step without work, of equal shares."""
    return StepShape(
        queries=(queries,) * size,
        keys=(keys,) * size,
        pairs=((0,) * size,) * size,
        num_heads=heads["num_heads"],
        num_kv_heads=heads["num_kv_heads"],
        head_dim=heads["head_dim"],
        itemsize=heads["itemsize"],
    )
