"""Prefill systems on an emulated cluster: time to first token against the rate of the links.

    sudo python benchmarks/cluster.py [--nodes 2] [--rates 10gbit,1gbit,100mbit] [--tokens 8192]
        [--save]

Nodes are network namespaces with one rank of one thread each; every link is limited by tc in both
directions. One job per system stays loaded while the rate changes under it, and systems take turns
on the same prompts (greedy, one new token and --decode more, no prefix caching):

    alone              one rank, no communication
    tp-chunked-N       TP over the nodes, prompts in chunks (Sarathi); the best of several N is kept
    tp                 TP over the nodes, whole prompts
    ring, ulysses      SP over the nodes, exact attention; ulysses also pipelined
    csa                SP over the nodes, sparse attention; also pipelined, and on one rank

At every rate answers must equal those of one rank. The rate at which dense Ulysses communicates as
long as it computes is searched for first and measured as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.emulated.jobs import JobFailed, Jobs
from benchmarks.emulated.measure import TOLERANCE, Measurement, say
from benchmarks.emulated.nodes import (
    Cluster,
    ClusterError,
    emulated_cluster,
    parse_rates,
    require_means,
)
from benchmarks.emulated.plot import plot
from benchmarks.emulated.result import Run, result_of
from benchmarks.emulated.systems import SHAPES, model_path, named, systems

EXIT_WRONG, EXIT_COULD_NOT_RUN = 1, 2
_CSA_CELLS = 8


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--nodes", type=int, default=2, help="nodes, of one rank each")
    made.add_argument(
        "--rates",
        type=lambda text: parse_rates(text.split(",")),
        default=parse_rates(["10gbit", "1gbit", "300mbit", "100mbit", "40mbit"]),
        help="link rates as tc writes them, or free",
    )
    made.add_argument(
        "--shapes", default="gqa,mha,sps2-tiny", help=f"models, of {', '.join(SHAPES)}"
    )
    made.add_argument(
        "--tokens", default="8192", help="prompt lengths; models that end earlier get their longest"
    )
    made.add_argument("--chunks", default="512,1024,2048", help="chunk sizes to choose from")
    made.add_argument("--degrees", default="1,4", help="CSA degrees, near and far")
    made.add_argument(
        "--latency-ms", type=float, default=0.0, help="added to every packet, each way"
    )
    made.add_argument(
        "--decode",
        type=int,
        default=0,
        help="tokens after the first one, for the time between them",
    )
    made.add_argument("--repeats", type=int, default=3, help="of every system at every rate")
    made.add_argument("--systems", default="", help="only these, by name")
    made.add_argument("--save", action="store_true", help="write docs/results/NAME.json and .png")
    made.add_argument("--name", default="cluster", help="of the result files")
    return made


def run_all(arguments: argparse.Namespace, cluster: Cluster) -> Iterator[Run]:
    """Yield one Run per model and length."""
    with tempfile.TemporaryDirectory() as place:
        for name in named(arguments.shapes, SHAPES, "shape"):
            shape = SHAPES[name]
            model = model_path(shape, Path(place))
            for tokens in sorted(
                {min(int(n), shape.longest - arguments.decode) for n in arguments.tokens.split(",")}
            ):
                degrees = tuple(map(int, arguments.degrees.split(",")))
                chosen = systems(
                    chunk_sizes=[int(size) for size in arguments.chunks.split(",")],
                    csa={"degrees": degrees, "spans": (-(-tokens // _CSA_CELLS),)},
                )
                if arguments.systems:
                    known = [system.name for system in chosen]
                    wanted = named(arguments.systems, known, "system")
                    chosen = [s for s in chosen if s.name in wanted]
                run = Run(shape=shape, tokens=tokens, decode=arguments.decode, systems=chosen)
                folder = Path(tempfile.mkdtemp(dir=place))
                with Jobs(cluster.nodes, folder) as jobs:
                    measurement = Measurement(
                        cluster,
                        jobs,
                        run,
                        model=model,
                        latency_s=arguments.latency_ms / 1e3,
                        folder=folder,
                    )
                    _measure(measurement, arguments)
                yield run


def _measure(measurement: Measurement, arguments: argparse.Namespace) -> None:
    measurement.start_for_tuning()
    measurement.find_balance(arguments.rates)
    rates = list(arguments.rates)
    balance = measurement.run.balance
    if balance is not None and balance not in rates:
        rates = sorted([r for r in rates if r is not None] + [balance], reverse=True)
        rates = [r for r in arguments.rates if r is None] + rates
    measurement.keep_best_chunk_size([rates[0], balance or rates[-1]])
    measurement.start_others()
    for rate in rates:
        measurement.measure(rate, arguments.repeats)


def report(arguments: argparse.Namespace, runs: list[Run]) -> dict[str, Any]:
    """Content of the result file below its head."""
    cores = machine.describe()["cores"]
    note = (
        f"{arguments.nodes} ranks of one thread share {cores} cores, "
        "also with the kernel's packet handling"
    )
    return {
        "nodes": arguments.nodes,
        "note": note,
        "latency_ms": arguments.latency_ms,
        "repeats": arguments.repeats,
        "csa": {"degrees": arguments.degrees, "cells": _CSA_CELLS},
        "runs": [result_of(run, arguments.nodes) for run in runs],
    }


def save(arguments: argparse.Namespace, runs: list[Run]) -> None:
    """Write docs/results/NAME.json and .png."""
    path = machine.save(arguments.name, report(arguments, runs))
    plot(runs, path.with_suffix(".png"))
    say(f"written: {path}")


def main() -> int:
    arguments = parser().parse_args()
    runs: list[Run] = []
    try:
        require_means()
        if arguments.nodes < 2 or arguments.repeats < 1 or arguments.decode < 0:
            raise ClusterError(
                f"2 nodes and 1 repeat at least, got {arguments.nodes} and {arguments.repeats}; "
                f"--decode must not be negative, got {arguments.decode}"
            )
        with emulated_cluster(arguments.nodes) as cluster:
            for run in run_all(arguments, cluster):
                runs.append(run)
                if arguments.save:  # keep what was measured, whatever follows
                    save(arguments, runs)
    except (ClusterError, JobFailed, ValueError) as error:
        sys.stderr.write(f"cluster: {error}\n")
        return EXIT_COULD_NOT_RUN
    print(json.dumps(report(arguments, runs), indent=2))
    wrong = {
        f"{run.shape.name} {name}": difference
        for run in runs
        for name, difference in run.differences.items()
        if difference > TOLERANCE
    }
    if wrong:
        say(f"answers differ from those of one rank by more than {TOLERANCE}: {wrong}")
        return EXIT_WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main())
