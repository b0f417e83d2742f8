"""Seconds of CSA over SP ranks: rows and pairs of the real pattern, scaled to each prompt.

With spans from the topology a longer prompt has the same picture at a larger scale: far pairs grow
with the square of its length and far rows with the length. So `planner.by_level` counts one long
prompt, once; sinks, halo and the exact tail, which do not grow like that, are added by count. Given
spans do not scale, and one prompt length alone can be priced. Attention to a rank's own keys hides
what arrives meanwhile (`overlap.level_layer`); exchanges are cut as in `attention.levels`, and each
part pays its own latencies. Each level takes the fastest transport.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sps2_mega.attention.csa.pattern import CSAPattern, topology_spans
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.levels.kv_parts import kv_parts_of_counts
from sps2_mega.attention.pipeline.micro_batches import CPU_PART, CUDA_PART
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.attention.planner.by_level import level_costs
from sps2_mega.attention.planner.overlap import level_layer
from sps2_mega.attention.planner.visible_rows import visible_between
from sps2_mega.config import CSAConfig
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.machine import Machine
from sps2_mega.parallel.topology import group_sizes_of
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.prompt import Prompt
from sps2_mega.simulator.transport_cost import AttentionSeconds

_SHARD = 4096  # tokens per rank of the prompt that is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class _Combination:
    """Cost of one choice of transports by level.

    `link_s` and `copy_s` (copies and merges) are per token of the prompt, `compute_s` per squared
    token, `latency_s` per part.
    """

    transports: tuple[str, ...]
    link_s: float
    compute_s: float
    copy_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCost:
    """CSA on one machine; heads are those of one TP rank.

    `own_s` are seconds per squared token of a rank's attention to its own keys.
    """

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
        """One layer of a step of `prompts`, by the fastest transports.

        Behind a cached prefix the far keys travel as for a fresh prompt, since new queries see
        cached keys of all ranks.
        """
        tokens = sum(prompt.end for prompt in prompts)
        squared = sum(float(p.end) ** 2 - float(p.start) ** 2 for p in prompts)
        near_s = self._near_s(prompts, hardware)
        parts = self._num_parts(prompts) if pipelined else None
        factor = hardware.stream_factor if pipelined else hardware.exchange_factor
        found = []
        for way in self.combinations:
            compute_s = way.compute_s * squared + way.copy_s * tokens + near_s
            link_s = way.link_s * tokens * factor
            out_s, in_s = self._tail_s(len(prompts))
            # The tail's queries leave the rank at which the far keys arrive.
            travel_s = max(link_s, out_s) + in_s
            own_s = min(compute_s, self.own_s * squared + near_s)
            layer = level_layer(
                own_s=own_s,
                far_s=compute_s - own_s,
                travel_s=travel_s,
                latency_s=(parts or 1) * way.latency_s + 2 * self.exchange_s,
                parts=parts,
                on_cpu=self.on_cpu,
            )
            found.append(AttentionSeconds.of(",".join(way.transports), layer))
        return min(found, key=lambda seconds: seconds.total_s)

    def visible_share(self, chunk: Prompt, hardware: Hardware) -> float:
        """Ratio of a chunk's arithmetic to that of exact attention.

        Chunks lie in stripes, so ranks have about the same to do: as much as under the transports
        that balance best.
        """
        least_s = min(way.compute_s for way in self.combinations)
        squared = float(chunk.end) ** 2 - float(chunk.start) ** 2
        seconds = least_s * squared + self._near_s([chunk], hardware)
        heads = self.num_heads / self.size
        flops = 4.0 * self.head_dim * heads * chunk.pairs
        return min(1.0, seconds * hardware.attention_flops_per_s / flops)

    def forced(self, transport: str) -> SparseCost:
        """This cost with one transport forced on every level."""
        kept = tuple(way for way in self.combinations if set(way.transports) == {transport})
        if not kept:
            raise ConfigError(f"CSA has no transport {transport!r} that the simulator prices")
        return replace(self, combinations=kept)

    def _near_s(self, prompts: list[Prompt], hardware: Hardware) -> float:
        """Seconds of sinks and halo, which every query sees, and of the tail, which sees all."""
        seen = self.csa.sinks + self.csa.halo
        pairs = sum(
            seen * (p.end - p.start) + min(self.csa.tail, p.end - p.start) * float(p.end)
            for p in prompts
        )
        flops = 4.0 * self.head_dim * self.num_heads * pairs / self.size
        return flops / hardware.attention_flops_per_s

    def _tail_s(self, num_prompts: int) -> tuple[float, float]:
        """Link seconds of the tail's queries out, and of partials, sinks and halo in."""
        row = self.head_dim * self.itemsize
        each_s = num_prompts / self.exchange_bytes_per_s
        queries = self.csa.tail * self.num_heads * row
        partials = self.csa.tail * self.num_heads * (row + 4)
        keys = (self.csa.sinks + self.csa.halo) * 2 * self.num_kv_heads * row
        return queries * each_s, (partials + keys) * each_s

    def _num_parts(self, prompts: list[Prompt]) -> int:
        return kv_parts_of_counts(
            PipelineSettings(),
            num_pairs=sum(prompt.pairs for prompt in prompts),
            num_keys=sum(prompt.end for prompt in prompts),
            sp_size=self.size,
            degree=self.csa.level_degrees[-1],
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            row_bytes=self.head_dim * self.itemsize,
            head_dim=self.head_dim,
            smallest=CPU_PART if self.on_cpu else CUDA_PART,
        )


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
    """Cost of CSA on one machine.

    Args:
        machine: SP levels and links; its `merge_s` is set.
        num_heads: query heads of one TP rank; `num_kv_heads` likewise.
        itemsize: bytes of a number of q, k and v.
        length: the only prompt length that will be priced, in tokens; needed where spans are given.

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
    costs = level_costs(visible, machine, itemsize=itemsize, **heads)
    # Pairs grow with the square of the length, copies and merges with the length.
    plain = replace(machine, copy_s=0.0, merge_s=0.0)
    attending = level_costs(visible, plain, itemsize=itemsize, **heads)
    slowest = max(machine.links, key=lambda link: link.latency_s)
    return SparseCost(
        csa=csa,
        size=size,
        itemsize=itemsize,
        own_s=min(cost.own_s for cost in attending.values()) / float(length) ** 2,
        exchange_s=slowest.latency_s,
        exchange_bytes_per_s=slowest.bytes_per_s,
        on_cpu=machine.on_cpu,
        combinations=tuple(
            _Combination(
                transports=way,
                link_s=cost.travel_s / length,
                compute_s=attending[way].compute_s / float(length) ** 2,
                copy_s=(cost.compute_s - attending[way].compute_s) / length,
                latency_s=cost.latency_s,
            )
            for way, cost in costs.items()
        ),
        **heads,
    )
