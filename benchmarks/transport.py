"""Prefill transports and the planner's choice on the same steps in one run.

    python benchmarks/transport.py                    all ranks on this machine's loopback
    sudo python benchmarks/transport.py --rates 1gbit,200mbit --save
                                                      also between two namespaces linked so

One layer's attention of a prefill step is timed on real ranks (`transports/rank.py`), without the
rest of the model: the transports take turns and the slowest rank counts. Fresh prompts are also
timed under CSA, with each combination of transports for the SP levels. `regret` is what the
planner's choice took over what the best one took, both forced: the median of the rounds' ratios,
against that one for which it is largest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.emulated.nodes import Link, emulated_cluster, parse_rate
from benchmarks.machine import ROOT, save
from benchmarks.transports.shapes import SHAPES, Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sp", type=_numbers, default=[2, 4], help="SP degrees, e.g. 2,4")
    parser.add_argument(
        "--rates", default="", help="link rates as tc writes them, e.g. 1gbit,200mbit"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--save", action="store_true", help="keep the result in docs/results")
    parser.add_argument("--output", type=Path, help="write the result to this file")
    args = parser.parse_args()
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
    print(f"within 10 % of the best: {good} of {len(rows)}")
    if args.output is not None:
        args.output.write_text(json.dumps({"jobs": results}))
    if args.save:
        print(save("transport", {"jobs": results}))


def _line(row: dict[str, Any]) -> str:
    shape = Shape(**row["shape"])
    rule = "exact" if row["degrees"] == [1] else "csa  "
    fastest = sorted(row["seconds"].items(), key=lambda item: item[1])[:4]
    times = "  ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in fastest)
    return (
        f"  {rule} {shape.new:5d} new {shape.cached:5d} cached {shape.heads:2d}/{shape.kv_heads} "
        "heads  "
        f"{times} ms   planned {row['planned']} x {row['regret']:.2f}"
    )


def _run_job(sp: int, rate: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the ranks, half of them on each of two nodes if `rate` is given; return rank 0's file."""
    with tempfile.TemporaryDirectory() as folder, _nodes(rate) as nodes:
        output = Path(folder) / "result.json"
        per_node = sp // len(nodes)
        script = str(Path(__file__).resolve().parent / "transports" / "rank.py")
        numbers = ["--rounds", str(args.rounds), "--shapes", str(args.shapes)]
        command = [sys.executable, script, str(output), *numbers]
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
    """Command prefix, environment and address of each node: this machine, or two namespaces."""
    if not rate:
        yield [([], {}, "127.0.0.1")]
        return
    if os.geteuid():
        raise SystemExit("--rates needs root: it makes network namespaces")
    with emulated_cluster(2) as cluster:
        cluster.set_link(Link(bits_per_s=parse_rate(rate)))
        yield [(node.prefix, node.environment, node.address) for node in cluster.nodes]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
