"""One rank of `transport.py`: one layer's attention by each transport, and the planner's choice.

Started by `transport.py` with the environment that launchers set; rank 0 writes the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.transports.shapes import DEGREES, SHAPES, TRANSPORTS, Shape
from sps2_mega.attention.build import make_transport
from sps2_mega.attention.csa.pattern import CSAPattern, tail_starts
from sps2_mega.attention.layout.token_layout import PrefillLayout, build_layout
from sps2_mega.attention.levels.kv_parts import num_kv_parts
from sps2_mega.attention.levels.transport import HierarchicalTransport
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.micro_batches import CPU_PART
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.attention.planner.by_level import CANDIDATES, choose_levels
from sps2_mega.attention.planner.exact import choose
from sps2_mega.attention.planner.step_shape import step_shape
from sps2_mega.attention.planner.visible_rows import visible_between
from sps2_mega.attention.transports.base import SoftmaxParams, Transport
from sps2_mega.comm.collectives import minimum
from sps2_mega.comm.comm_streams import make_comm_streams
from sps2_mega.comm.probe import agree_most
from sps2_mega.config import ParallelConfig
from sps2_mega.engine.startup.machine_probe import describe, machine_facts
from sps2_mega.engine.startup.transport_probe import LayerHeads
from sps2_mega.kv_cache.placement import Layout, prompt_block_ranks
from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.parallel.machine import Machine

BLOCK = 16
_CPU = torch.device("cpu")
_CELLS = 8
# A planned `ulysses` finds the zigzag that the engine uses under `auto`; forced, it has the order
# it likes.
_ZIGZAG_ULYSSES = "ulysses in zigzag"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--shapes", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    info = from_environment()
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(sp=info.world_size))
    groups = initialize(store, info, topology, device=_CPU, timeout_s=120)
    began = time.monotonic()
    machine = machine_facts(
        groups,
        LayerHeads(num_heads=8, num_kv_heads=2, head_dim=64, dtype=torch.float32),
        device=_CPU,
        network=info.master_addr,
        folder=args.output.parent,
    )
    probe_s = time.monotonic() - began
    if info.rank == 0:
        print(f"  {describe(machine)}; probe {probe_s:.2f} s", flush=True)
    pipeline = Pipeline(make_comm_streams(_CPU), groups.sp_back, settings=PipelineSettings())
    rows = []
    for shape in SHAPES[: args.shapes]:
        rows.append(_exact(shape, groups, machine, pipeline, args.rounds))
        if (
            not shape.cached
        ):  # CSA is for what is new; behind a long prefix only the tail is left of it
            rows.append(_sparse(shape, groups, machine, pipeline, args.rounds))
    if info.rank == 0:
        facts = json.loads(machine.to_json())
        args.output.write_text(json.dumps({"probe_s": probe_s, "machine": facts, "shapes": rows}))
    finalize()


def _exact(
    shape: Shape, groups: ParallelGroups, machine: Machine, pipeline: Pipeline, rounds: int
) -> dict[str, Any]:
    """Time exact attention, with one transport for all levels."""
    contestants = {}
    for name in (*TRANSPORTS, _ZIGZAG_ULYSSES):
        layout = _layout(shape, groups.sp.size, "contiguous" if name == "ulysses" else "zigzag")
        transport = make_transport(name.split()[0], layout, groups.sp, _CPU, pipeline)
        contestants[name] = _attention(transport, shape, layout, groups.sp.rank)
    samples = _take_turns(contestants, groups, rounds)
    layout = _layout(shape, groups.sp.size, "zigzag")
    chosen = choose(_counts(shape, layout), machine, overlap=True)
    taken = _ZIGZAG_ULYSSES if chosen.transport == "ulysses" else chosen.transport
    return {
        "shape": asdict(shape),
        "degrees": [1],
        "planned": chosen.transport,
        "estimates": {e.transport: e.seconds for e in chosen.estimates},
        **_judged(samples, taken, TRANSPORTS),
    }


def _sparse(
    shape: Shape, groups: ParallelGroups, machine: Machine, pipeline: Pipeline, rounds: int
) -> dict[str, Any]:
    """Time CSA over cells of an eighth of the prompt, with every combination of transports."""
    layout = _layout(shape, groups.sp.size, "contiguous")
    pattern = CSAPattern(
        degrees=DEGREES,
        spans=(-(-shape.new // _CELLS),),
        sinks=16,
        halo=128,
        tail=128,
        sample_queries=False,
    )
    kv_heads = range(shape.kv_heads)
    contestants = {}
    for names in itertools.product(CANDIDATES, repeat=len(machine.sp_levels)):
        transport = HierarchicalTransport(
            layout,
            [pattern],
            [shape.new],
            names,
            machine.sp_levels,
            kv_heads=kv_heads,
            group=groups.sp,
            device=_CPU,
            pipeline=pipeline,
        )
        contestants[",".join(names)] = _attention(transport, shape, layout, groups.sp.rank)
    samples = _take_turns(contestants, groups, rounds)
    visible = visible_between(layout, [pattern], tail_starts([pattern], [shape.new]), kv_heads)
    chosen = choose_levels(
        visible,
        machine,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.width,
        itemsize=4,
        parts=num_kv_parts(
            layout,
            [pattern],
            pipeline.settings,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            row_bytes=4 * shape.width,
            head_dim=shape.width,
            smallest=CPU_PART,
        ),
    )
    planned = ",".join(chosen.transports)
    return {
        "shape": asdict(shape),
        "degrees": DEGREES,
        "planned": planned,
        "estimates": {",".join(names): found for names, found in chosen.seconds.items()},
        **_judged(samples, planned, samples),
    }


def _layout(shape: Shape, sp: int, order: Layout) -> PrefillLayout:
    # As after an earlier turn: the prefix lies where its own prefill put it, and new blocks are
    # spread anew.
    ranks: list[int] = []
    for tokens in (shape.cached, shape.new):
        ranks += prompt_block_ranks(-(-tokens // BLOCK), [10**6] * sp, order) or []
    return build_layout(
        [ranks], [shape.cached + shape.new], starts=[shape.cached], block_size=BLOCK, sp_size=sp
    )


def _counts(shape: Shape, layout: PrefillLayout) -> Any:
    return step_shape(
        layout,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.width,
        itemsize=4,
    )


def _attention(
    transport: Transport, shape: Shape, layout: PrefillLayout, rank: int
) -> Callable[[], Tensor]:
    q = torch.randn(layout.queries.counts[rank], shape.heads, shape.width)
    k, v = torch.randn(2, layout.keys.counts[rank], shape.kv_heads, shape.width)
    return lambda: transport.attend(0, q, k, v, SoftmaxParams(0.1))


def _take_turns(
    contestants: dict[str, Callable[[], Tensor]], groups: ParallelGroups, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, on the slowest rank; a warm-up does not count.

    Short steps get more rounds, until they have taken a second or ten times as many. Each round has
    an order of its own, the same on all ranks, since a contestant leaves queues and windows behind.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    shuffle = random.Random(0).shuffle
    spent = 0.0
    for round_number in range(10 * rounds + 1):
        order = list(contestants)
        shuffle(order)
        for name in order:
            attend = contestants[name]
            minimum(0, groups.control)  # all begin together
            began = time.perf_counter()
            attend()
            seconds = agree_most(time.perf_counter() - began, groups.control)
            spent += seconds
            if round_number:
                samples[name].append(seconds)
        if round_number >= rounds and spent >= len(contestants):
            break
    return samples


def _judged(samples: dict[str, list[float]], planned: str, forced: Iterable[str]) -> dict[str, Any]:
    """Medians, and `regret`: the planned contestant's excess over the best forced one.

    They are compared round by round, as the machine's speed changes from one to the next more than
    within one.
    """
    regrets = {
        name: median(a / b for a, b in zip(samples[planned], samples[name], strict=True))
        for name in forced
    }
    best = max(regrets, key=regrets.__getitem__)
    return {
        "seconds": {name: median(values) for name, values in samples.items()},
        "rounds": len(samples[planned]),
        "best": best,
        "regret": max(1.0, regrets[best]),
    }


if __name__ == "__main__":
    main()
