"""Overhead of a layer's attention with each transport, beyond its bytes and FLOPs.

Between CPUs every message, call and copy takes time of a core, and ranks may share cores. So short
layers are timed with the transports themselves, and the formulas' part is subtracted. All ranks of
the SP group take part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from sps2_mega.attention.build import make_transport
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.layout.token_layout import PrefillLayout, build_layout
from sps2_mega.attention.levels.transport import HierarchicalTransport
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.attention.planner.by_level import CANDIDATES
from sps2_mega.attention.planner.exact import TRANSPORTS, estimate
from sps2_mega.attention.planner.step_shape import step_shape
from sps2_mega.attention.transports.base import SoftmaxParams, Transport
from sps2_mega.comm.collectives import minimum
from sps2_mega.comm.comm_streams import make_comm_streams
from sps2_mega.comm.probe import agree_most
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.machine import PROBED_TOKENS, Machine

_ROUNDS, _FEWEST_ROUNDS = 40, 3
_LONG_ENOUGH_S = 0.3  # for one size
_SPARSE_TOKENS = 16  # per rank
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerHeads:
    """Attention heads of one TP rank, their width and dtype."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


def measure_layers(machine: Machine, groups: ParallelGroups, heads: LayerHeads) -> Machine:
    """Machine with `layer_s` and `work_s`: medians of the slowest rank; unchanged for one rank."""
    sp = groups.sp
    if sp.size == 1:
        return machine
    pipeline = Pipeline(make_comm_streams(_CPU), groups.sp_back, settings=PipelineSettings())
    few, many = (_beside(tokens, machine, groups, heads, pipeline) for tokens in PROBED_TOKENS)
    # More tokens never need fewer calls or messages: a smaller overhead is noise of link or clock.
    layer_s: dict[str, tuple[float, ...]] = {
        name: (few[name], max(few[name], many[name])) for name in TRANSPORTS
    }
    taken = _take_turns(
        [_sparse(name, groups, heads, pipeline) for name in CANDIDATES],
        _SPARSE_TOKENS,
        groups,
        heads,
    )
    moving = sum(level.size > 1 for level in groups.sp_levels)
    work_s = {name: seconds / moving for name, seconds in zip(CANDIDATES, taken, strict=True)}
    pipeline.take_seconds()
    return replace(machine, layer_s=layer_s, work_s=work_s)


def _beside(
    tokens: int, machine: Machine, groups: ParallelGroups, heads: LayerHeads, pipeline: Pipeline
) -> dict[str, float]:
    """Overhead of each exact transport for `tokens` per rank: seconds beyond the formulas."""
    sp = groups.sp
    layout = _layout([*range(sp.size), *reversed(range(sp.size))], tokens // 2, sp.size)
    taken = _take_turns(
        [make_transport(name, layout, sp, _CPU, pipeline) for name in TRANSPORTS],
        tokens,
        groups,
        heads,
    )
    shape = step_shape(
        layout,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        itemsize=heads.dtype.itemsize,
    )
    formulas = replace(machine, layer_s=dict.fromkeys(TRANSPORTS, (0.0, 0.0)))
    beside = {}
    for name, seconds in zip(TRANSPORTS, taken, strict=True):
        found = estimate(name, shape, formulas)
        beside[name] = max(0.0, seconds - found.seconds) / found.micro_batches
    return beside


def _layout(ranks: Sequence[int], block_size: int, sp_size: int) -> PrefillLayout:
    return build_layout([ranks], [block_size * len(ranks)], block_size=block_size, sp_size=sp_size)


def _sparse(name: str, groups: ParallelGroups, heads: LayerHeads, pipeline: Pipeline) -> Transport:
    """Level transport with next to no near and far keys, the same on all levels.

    A span is one rank's tokens.
    """
    sp, tokens = groups.sp, _SPARSE_TOKENS
    pattern = CSAPattern(
        degrees=(1, 2), spans=(tokens,), sinks=0, halo=0, tail=0, sample_queries=False
    )
    return HierarchicalTransport(
        _layout([rank for rank in range(sp.size) for _ in range(2)], tokens // 2, sp.size),
        [pattern],
        [tokens * sp.size],
        (name,),
        tuple(level.size for level in groups.sp_levels),
        kv_heads=range(heads.num_kv_heads),
        group=sp,
        device=_CPU,
        pipeline=pipeline,
    )


def _take_turns(
    contestants: Sequence[Transport], tokens: int, groups: ParallelGroups, heads: LayerHeads
) -> list[float]:
    """Median seconds of each transport's layer of `tokens` tokens per rank, on the slowest rank.

    The first round plans and is not counted. There are fewer rounds where links are slow.
    """
    q = torch.zeros(tokens, heads.num_heads, heads.head_dim, dtype=heads.dtype)
    k, v = torch.zeros(2, tokens, heads.num_kv_heads, heads.head_dim, dtype=heads.dtype)

    def seconds(transport: Transport) -> float:
        minimum(0, groups.control)  # a barrier
        began = time.perf_counter()
        transport.attend(0, q, k, v, SoftmaxParams(1.0))
        return agree_most(time.perf_counter() - began, groups.control)

    for transport in contestants:
        seconds(transport)
    rounds: list[list[float]] = []
    while len(rounds) < _FEWEST_ROUNDS or (
        len(rounds) < _ROUNDS and sum(map(sum, rounds)) < _LONG_ENOUGH_S
    ):
        rounds.append([seconds(transport) for transport in contestants])
    return [median(column) for column in zip(*rounds, strict=True)]
