"""Seconds of CSA attention over SP ranks: rows and pairs of the real pattern, scaled to each
prompt.

With spans from the topology a longer prompt has the same picture at a larger scale: far pairs grow
with the square of its length and far rows with the length. So the level planner is asked once,
about one long prompt; sinks, halo and the exact tail, which do not grow so, are added by count.
Given spans do not scale: then it is asked about the one length that is to be priced. What a rank
computes on its own keys comes first and hides what comes in then; exchanges are cut as
`attention.leveled` cuts them, and each part pays its own latencies. Decides which transport each
level takes: the fastest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sps2_mega.attention.csa.pattern import CSAPattern, topology_spans
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.pipeline.settings import (
    CPU_PART,
    CUDA_PART,
    PipelineSettings,
    num_micro_batches,
)
from sps2_mega.attention.planner.by_level import Pair, choose_levels, visible_between
from sps2_mega.attention.planner.overlap import works_s
from sps2_mega.config import CSAConfig
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.machine import Machine
from sps2_mega.parallel.topology import group_sizes_of
from sps2_mega.simulator.compute import causal_pairs
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.transport_cost import AttentionSeconds

_SHARD = 4096  # tokens per rank of the prompt that is looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Tokens [start, end) of one sequence are new."""

    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Combination:
    """Transports by level; `link_s` and `copy_s` (merges too) per token of the prompt, `compute_s`
    per squared token, `latency_s` as it is."""

    transports: tuple[str, ...]
    link_s: float
    compute_s: float
    copy_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCost:
    """CSA on one machine; heads are those of one TP rank. `own_s` is what a rank computes on its
    own keys, per squared token."""

    csa: CSAConfig
    size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    own_s: float
    exchange_s: float
    exchange_bytes_per_s: float
    on_cpu: bool
    combinations: tuple[_Combination, ...]

    def seconds(
        self, prompts: list[Prompt], hardware: Hardware, *, pipelined: bool
    ) -> AttentionSeconds:
        """The whole prompts of one step; of one with a cached prefix the far keys travel as for a
        fresh one, since the new queries see cached keys of all ranks."""
        tokens = sum(prompt.end for prompt in prompts)
        squared = sum(float(p.end) ** 2 - float(p.start) ** 2 for p in prompts)
        near_s = self._near_s(prompts, hardware)
        parts = self._num_parts(prompts) if pipelined else 1
        factor = hardware.stream_factor if pipelined else hardware.exchange_factor
        found = []
        for way in self.combinations:
            compute_s = way.compute_s * squared + way.copy_s * tokens + near_s
            link_s = way.link_s * tokens * factor
            out_s, in_s = self._tail_s(len(prompts))
            # The tail's queries leave the rank that the far keys come to.
            travel_s = max(link_s, out_s) + in_s
            latency_s = parts * way.latency_s + 2 * self.exchange_s
            comm_s = travel_s + latency_s
            total = compute_s + comm_s
            if pipelined:
                own_s = min(compute_s, self.own_s * squared + near_s)
                far_s = [(compute_s - own_s) / parts] * parts
                # As in `transport_cost`: between CPUs latencies are time of a core.
                hidden_s, core_s = (travel_s, latency_s) if self.on_cpu else (comm_s, 0.0)
                total = core_s + works_s(own_s, [hidden_s / parts] * parts, far_s)
            found.append(
                AttentionSeconds(
                    transport=",".join(way.transports),
                    compute_s=compute_s,
                    comm_s=comm_s,
                    exposed_s=total - compute_s,
                )
            )
        return min(found, key=lambda seconds: seconds.total_s)

    def visible_share(self, chunk: Prompt, hardware: Hardware) -> float:
        """Arithmetic of a chunk's queries over that of exact attention. Chunks lie in stripes, so
        that ranks have about the same to do: as much as where the work is dealt out best."""
        least_s = min(way.compute_s for way in self.combinations)
        squared = float(chunk.end) ** 2 - float(chunk.start) ** 2
        seconds = least_s * squared + self._near_s([chunk], hardware)
        heads = self.num_heads / self.size
        flops = 4.0 * self.head_dim * heads * causal_pairs(chunk.start, chunk.end)
        return min(1.0, seconds * hardware.attention_flops_per_s / flops)

    def forced(self, transport: str) -> SparseCost:
        """The same where one transport is forced on every level."""
        kept = tuple(way for way in self.combinations if set(way.transports) == {transport})
        if not kept:
            raise ConfigError(f"CSA has no transport {transport!r} that the simulator prices")
        return replace(self, combinations=kept)

    def _near_s(self, prompts: list[Prompt], hardware: Hardware) -> float:
        """Sinks and halo, which every query sees, and the tail, which sees all keys."""
        seen = self.csa.sinks + self.csa.halo
        pairs = sum(
            seen * (p.end - p.start) + min(self.csa.tail, p.end - p.start) * float(p.end)
            for p in prompts
        )
        flops = 4.0 * self.head_dim * self.num_heads * pairs / self.size
        return flops / hardware.attention_flops_per_s

    def _tail_s(self, num_prompts: int) -> tuple[float, float]:
        """Queries of the tail go to all ranks; partials come back, and sinks and halo come once:
        (out, in)."""
        row = self.head_dim * self.itemsize
        each_s = num_prompts / self.exchange_bytes_per_s
        queries = self.csa.tail * self.num_heads * row
        partials = self.csa.tail * self.num_heads * (row + 4)
        keys = (self.csa.sinks + self.csa.halo) * 2 * self.num_kv_heads * row
        return queries * each_s, (partials + keys) * each_s

    def _num_parts(self, prompts: list[Prompt]) -> int:
        """As `attention.leveled.num_kv_parts` counts; the formula is repeated here because that
        module needs torch."""
        row = self.head_dim * self.itemsize
        shares = self.size * self.csa.level_degrees[-1]
        keys = sum(p.end for p in prompts)
        pairs = sum(causal_pairs(p.start, p.end) for p in prompts)
        wanted = num_micro_batches(
            PipelineSettings(),
            num_bytes=2 * keys * self.num_kv_heads * row * (self.size - 1) // shares,
            flops=int(4 * pairs * self.num_heads * self.head_dim / shares),
            smallest=CPU_PART if self.on_cpu else CUDA_PART,
        )
        return min(wanted, self.num_kv_heads)


def sparse_cost(
    csa: CSAConfig,
    machine: Machine,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    length: int | None = None,
) -> SparseCost:
    """`length`: the only prompt length that will be priced, needed where spans are given.

    Raises:
        ConfigError: spans without a length (only those from the topology scale), or degrees do not
            fit the levels.
    """
    if csa.spans is not None and length is None:
        raise ConfigError(f"the simulator prices CSA spans from the topology, got {csa.spans}")
    size = math.prod(machine.sp_levels)
    heads = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    length = length or _SHARD * size
    shard = -(-length // size)
    pattern = CSAPattern(
        degrees=csa.level_degrees,
        spans=csa.spans or topology_spans(shard, group_sizes_of(machine.sp_levels)),
        sinks=0,
        halo=0,
        tail=0,
        sample_queries=csa.sample_queries,
        block=csa.block,
    )
    layout = build_layout([list(range(size))], [length], block_size=shard, sp_size=size)
    visible = visible_between(layout, [pattern], [length], range(num_kv_heads))

    def seconds(
        fake: Machine, seen: dict[tuple[int, int], Pair] = visible
    ) -> dict[tuple[str, ...], float]:
        chosen = choose_levels(seen, fake, itemsize=itemsize, parts=None, **heads)
        return chosen.seconds

    # One thing at a time: bytes, arithmetic, copies and merges, messages.
    silent = tuple(replace(link, latency_s=0.0) for link in machine.links)
    instant = tuple(replace(link, latency_s=0.0, bytes_per_s=math.inf) for link in machine.links)
    late = tuple(replace(link, bytes_per_s=math.inf) for link in machine.links)
    plain = replace(machine, copy_s=0.0, merge_s=0.0)
    link_s = seconds(replace(plain, links=silent, flops_per_s=math.inf))
    compute_s = seconds(replace(plain, links=instant))
    copied_s = seconds(replace(machine, links=instant))
    latency_s = seconds(replace(plain, links=late, flops_per_s=math.inf))
    own = {ranks: pair for ranks, pair in visible.items() if ranks[0] == ranks[1]}
    own_s = min(seconds(replace(plain, links=instant), own).values())
    slowest = max(machine.links, key=lambda link: link.latency_s)
    return SparseCost(
        csa=csa,
        size=size,
        itemsize=itemsize,
        own_s=own_s / float(length) ** 2,
        exchange_s=slowest.latency_s,
        exchange_bytes_per_s=slowest.bytes_per_s,
        on_cpu=machine.on_cpu,
        combinations=tuple(
            _Combination(
                transports=way,
                link_s=link_s[way] / length,
                compute_s=compute_s[way] / float(length) ** 2,
                copy_s=(copied_s[way] - compute_s[way]) / length,
                latency_s=latency_s[way],
            )
            for way in link_s
        ),
        **heads,
    )
