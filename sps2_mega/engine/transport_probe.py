"""What a layer's attention costs with each transport when there is next to nothing to compute and to move.

Between CPUs every message, call and copy takes time of a core, and ranks may share cores, so what a layer costs beside its
bytes and FLOPs is measured as it is, with the transports themselves. All ranks of the SP group take part.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from sps2_mega.attention.layout import build_layout
from sps2_mega.attention.level_planner import CANDIDATES
from sps2_mega.attention.leveled import Leveled
from sps2_mega.attention.pattern import CSAPattern
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.attention.planner import TRANSPORTS
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.attention.transports import Transport, make_transport
from sps2_mega.comm.collectives import minimum
from sps2_mega.comm.lanes import make_lanes
from sps2_mega.comm.probe import agree_most
from sps2_mega.parallel.groups import ParallelGroups

_BLOCK = 8  # two per rank: a zigzag's halves
_ROUNDS = 40
_CPU = torch.device("cpu")


def measure_layers(
    groups: ParallelGroups, *, head_dim: int, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a layer of 16 tokens per rank on CPUs, the slowest rank's median: by exact transport, and by transport
    of an SP level in a sparse layer, shared among the levels. Nothing for one rank."""
    sp = groups.sp
    if sp.size == 1:
        return {}, {}
    tokens = 2 * _BLOCK * sp.size
    pipeline = Pipeline(make_lanes(_CPU), groups.sp_back, settings=PipelineSettings())
    zigzag = build_layout(
        [[*range(sp.size), *reversed(range(sp.size))]],
        [tokens],
        block_size=_BLOCK,
        sp_size=sp.size,
    )
    contiguous = build_layout(
        [[rank for rank in range(sp.size) for _ in range(2)]],
        [tokens],
        block_size=_BLOCK,
        sp_size=sp.size,
    )
    levels = tuple(level.size for level in groups.sp_levels)
    pattern = CSAPattern(
        degrees=(1, 2),
        spans=(2 * _BLOCK,),
        sinks=0,
        halo=0,
        tail=0,
        sample_queries=False,
    )
    heads = max(4, sp.size)  # some for each rank
    layers: dict[str, Transport] = {
        name: make_transport(name, zigzag, sp, _CPU, pipeline) for name in TRANSPORTS
    }
    works: dict[str, Transport] = {
        name: Leveled(
            contiguous,
            [pattern],
            [tokens],
            (name,),
            levels,
            kv_heads=range(heads),
            group=sp,
            device=_CPU,
            pipeline=pipeline,
        )
        for name in CANDIDATES
    }
    q, k, v = torch.zeros(3, 2 * _BLOCK, heads, head_dim, dtype=dtype)

    def seconds(transport: Transport) -> float:
        minimum(0, groups.control)  # all begin together
        began = time.perf_counter()
        transport.attend(0, q, k, v, ScoreRule(1.0))
        return agree_most(time.perf_counter() - began, groups.control)

    contestants = [*layers.values(), *works.values()]
    rounds = [[seconds(transport) for transport in contestants] for _ in range(_ROUNDS + 1)]
    pipeline.take_seconds()
    taken = [median(column) for column in zip(*rounds[1:], strict=True)]  # the first one plans
    moving = sum(size > 1 for size in levels)
    return (
        dict(zip(layers, taken[: len(layers)], strict=True)),
        {name: s / moving for name, s in zip(works, taken[len(layers) :], strict=True)},
    )
