"""Each prefill transport, and the planner's choice, on the same steps in one run: is the choice the fastest?

    python tools/bench/transport.py                          all ranks on this machine's loopback
    python tools/bench/transport.py --rates 1gbit,200mbit    also between two namespaces with such a cable (root)

One layer's attention of a prefill step is timed on real ranks, without the rest of the model: the transports take
turns, the slowest rank counts, and the median of the rounds is kept. `regret` is what the planner's choice took
over what the best one took, both forced.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench.machine import ROOT, save

TRANSPORTS = ("ulysses", "gather", "ring", "pass_q")
BLOCK = 16


@dataclass(frozen=True)
class Shape:
    """A step of `new` tokens behind `cached` ones, with heads of one TP rank."""

    new: int
    cached: int
    heads: int
    kv_heads: int
    width: int = 64


SHAPES = (
    Shape(2048, 0, 8, 8),
    Shape(2048, 0, 8, 2),
    Shape(2048, 0, 16, 1),
    Shape(256, 0, 8, 2),
    Shape(128, 4096, 8, 2),
    Shape(128, 4096, 8, 8),
    Shape(1024, 2048, 8, 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sp", type=_numbers, default=[2, 4], help="SP degrees, e.g. 2,4")
    parser.add_argument(
        "--rates", default="", help="cable rates as tc writes them, e.g. 1gbit,200mbit"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--rank-output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_output:
        _run_rank(SHAPES[: args.shapes], args.rounds, Path(args.rank_output))
        return
    results = []
    for rate in ["", *filter(None, args.rates.split(","))]:
        for sp in args.sp:
            print(f"sp={sp} on {rate or 'loopback'}", flush=True)
            job = _run_job(sp, rate, args)
            for row in job["shapes"]:
                print(_line(row), flush=True)
            results.append({"sp": sp, "rate": rate or "loopback", **job})
    rows = [row for job in results for row in job["shapes"]]
    good = sum(row["regret"] <= 1.10 for row in rows)
    print(f"within 10 % of the best: {good} of {len(rows)}; {save('transport', {'jobs': results})}")


def _line(row: dict[str, Any]) -> str:
    shape = Shape(**row["shape"])
    times = "  ".join(f"{name} {row['seconds'][name] * 1e3:7.1f}" for name in TRANSPORTS)
    return (
        f"  {shape.new:5d} new {shape.cached:5d} cached {shape.heads:2d}/{shape.kv_heads} heads  "
        f"{times} ms   planned {row['planned']:8s} x {row['regret']:.2f}"
    )


def _run_job(sp: int, rate: str, args: argparse.Namespace) -> dict[str, Any]:
    """Starts the ranks, half of them on each node where there is a cable, and returns what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder, _nodes(rate) as nodes:
        output = Path(folder) / "result.json"
        per_node = sp // len(nodes)
        script = str(Path(__file__).resolve())
        numbers = ["--rounds", str(args.rounds), "--shapes", str(args.shapes)]
        command = [sys.executable, script, *numbers, "--rank-output", str(output)]
        ranks = []
        for rank in range(sp):
            prefix, environment, _ = nodes[rank // per_node]
            ranks.append(
                subprocess.Popen(
                    [*prefix, *command],
                    cwd=ROOT,
                    env=os.environ
                    | environment
                    | {
                        "RANK": str(rank),
                        "WORLD_SIZE": str(sp),
                        "LOCAL_RANK": str(rank % per_node),
                        "LOCAL_WORLD_SIZE": str(per_node),
                        "NODE_RANK": str(rank // per_node),
                        "MASTER_ADDR": nodes[0][2],
                        "MASTER_PORT": "29517",
                        "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": str(ROOT),
                    },
                )
            )
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"ranks ended with exit codes {codes}")
        result: dict[str, Any] = json.loads(output.read_text())
        return result


@contextlib.contextmanager
def _nodes(rate: str) -> Iterator[list[tuple[list[str], dict[str, str], str]]]:
    """(command prefix, environment, address) of each node: this machine, or two namespaces with a cable."""
    if not rate:
        yield [([], {}, "127.0.0.1")]
        return
    if os.geteuid():
        raise SystemExit("--rates needs root: it makes network namespaces")
    from tests.netns import two_nodes

    with two_nodes(rate) as pair:
        yield [(node.prefix, node.environment, node.address) for node in pair]


def _run_rank(shapes: tuple[Shape, ...], rounds: int, output: Path) -> None:
    import torch

    from sps2_mega.attention.planner import choose
    from sps2_mega.config import ParallelConfig
    from sps2_mega.engine.machine_probe import describe, machine_facts
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    torch.set_num_threads(1)
    info, cpu = from_environment(), torch.device("cpu")
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(sp=info.world_size))
    groups = initialize(store, info, topology, device=cpu, timeout_s=120)
    began = time.monotonic()
    machine = machine_facts(
        groups,
        head_dim=64,
        dtype=torch.float32,
        device=cpu,
        network=info.master_addr,
        folder=output.parent,
    )
    probe_s = time.monotonic() - began
    rows = []
    for shape in shapes:
        seconds = _time_all(shape, groups, rounds)
        chosen = choose(_step_shape(shape, info.world_size), machine, overlap=True)
        planned = chosen.transport
        taken = seconds["ulysses in zigzag" if planned == "ulysses" else planned]
        rows.append(
            {
                "shape": asdict(shape),
                "seconds": seconds,
                "planned": planned,
                "estimates": {e.transport: e.seconds for e in chosen.estimates},
                "regret": taken / min(seconds[name] for name in TRANSPORTS),
            }
        )
    if info.rank == 0:
        print(f"  {describe(machine)}; probe {probe_s:.2f} s", flush=True)
        facts = json.loads(machine.to_json())
        output.write_text(json.dumps({"probe_s": probe_s, "machine": facts, "shapes": rows}))
    finalize()


def _layout(shape: Shape, sp: int, order: str) -> Any:
    from sps2_mega.attention.layout import build_layout
    from sps2_mega.kv_cache.placement import prompt_block_ranks

    # As after an earlier turn: the prefix lies where its own prefill put it, the new blocks are spread anew.
    ranks: list[int] = []
    for tokens in (shape.cached, shape.new):
        ranks += prompt_block_ranks(-(-tokens // BLOCK), [10**6] * sp, order) or []  # type: ignore[arg-type]
    return build_layout(
        [ranks], [shape.cached + shape.new], starts=[shape.cached], block_size=BLOCK, sp_size=sp
    )


def _step_shape(shape: Shape, sp: int) -> Any:
    from sps2_mega.attention.step_shape import step_shape

    return step_shape(
        _layout(shape, sp, "zigzag"),
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.width,
        itemsize=4,
    )


def _time_all(shape: Shape, groups: Any, rounds: int) -> dict[str, float]:
    """Median seconds of each transport, slowest rank, each with its own placement; a planned `ulysses` finds the
    zigzag that the engine uses under `auto`."""
    import torch

    from sps2_mega.attention.pipeline.executor import Pipeline
    from sps2_mega.attention.pipeline.settings import PipelineSettings
    from sps2_mega.attention.rule import ScoreRule
    from sps2_mega.attention.transports import make_transport
    from sps2_mega.comm.collectives import minimum
    from sps2_mega.comm.lanes import make_lanes
    from sps2_mega.comm.probe import agree_most

    sp, rank = groups.sp.size, groups.sp.rank
    cpu = torch.device("cpu")
    pipeline = Pipeline(make_lanes(cpu), groups.sp_back, settings=PipelineSettings())
    contestants = {}
    for name in TRANSPORTS:
        for order in ("contiguous", "zigzag") if name == "ulysses" else ("zigzag",):
            layout = _layout(shape, sp, order)
            q = torch.randn(layout.queries.counts[rank], shape.heads, shape.width)
            k, v = torch.randn(2, layout.keys.counts[rank], shape.kv_heads, shape.width)
            transport = make_transport(name, layout, groups.sp, cpu, pipeline)
            contestants[name, order] = (transport, q, k, v)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in contestants}
    for round_number in range(rounds + 1):
        for key, (transport, q, k, v) in contestants.items():
            minimum(0, groups.control)  # all begin together
            began = time.perf_counter()
            transport.attend(0, q, k, v, ScoreRule(0.1))
            seconds = agree_most(time.perf_counter() - began, groups.control)
            if round_number:
                samples[key].append(seconds)
    medians = {key: median(values) for key, values in samples.items()}
    return {
        "ulysses": medians["ulysses", "contiguous"],
        "ulysses in zigzag": medians["ulysses", "zigzag"],
        **{name: medians[name, "zigzag"] for name in TRANSPORTS if name != "ulysses"},
    }


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
