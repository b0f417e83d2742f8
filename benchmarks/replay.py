"""Replay of trace slices over HTTP on an emulated cluster: chunked prefill over TP against SPS2.

    sudo python benchmarks/replay.py --save [--rates 1gbit,120mbit] [--slices 3] [--requests 40]

Results already saved with the same settings are kept: an interrupted run continues, unless --again
is given.

    sarathi    launch/serve.py --tp N --scheduler sarathi, with the chunk size that served a slice
               of its own best
    sps2       --sp N, exact attention
    sps2-csa   --sp N --csa-degrees 1,4

Nodes are network namespaces with one rank of one thread each and links of a given rate
(cluster.py). Every system gets the same slices of the trace, scaled in length and time, from
benchmarks/serving.py on the first node; ratios are paired by slice. Only one server runs at a time.
Decides what is run; `trace_replay.figures` decides what the numbers say.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.emulated.measure import say
from benchmarks.emulated.nodes import (
    Cluster,
    ClusterError,
    Link,
    emulated_cluster,
    parse_rates,
    rate_name,
    require_means,
)
from benchmarks.load.stretched_model import stretched
from benchmarks.trace_replay.figures import table
from benchmarks.trace_replay.server import served_on_nodes
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.trace_files import read_trace

BASELINE = "sarathi"
SYSTEMS = {"sps2": [], "sps2-csa": ["--csa-degrees", "1,4"]}
_PORT = 29800


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--nodes", type=int, default=2, help="nodes, of one rank each")
    made.add_argument("--rates", default="1gbit,120mbit", help="of the links, as tc writes them")
    made.add_argument("--systems", default=",".join(SYSTEMS), help="against the baseline")
    made.add_argument("--chunks", default="256,512,1024", help="for the baseline, to choose from")
    made.add_argument("--model", default="sps2-tiny", help="its context is stretched where needed")
    made.add_argument(
        "--max-model-len", type=int, default=16384, help="longer requests are left out"
    )
    made.add_argument("--trace", default="mooncake", help="a bundled name, or a file")
    made.add_argument("--requests", type=int, default=40, help="of each slice")
    made.add_argument(
        "--slices", type=int, default=3, help="slices of the trace, one after the other"
    )
    made.add_argument("--length-scale", type=float, default=0.15, help="of prompts")
    made.add_argument("--output-scale", type=float, default=0.1, help="of outputs")
    made.add_argument("--time-scale", type=float, default=4.0, help="of times between requests")
    made.add_argument("--save", action="store_true", help="write docs/results/NAME.json and .png")
    made.add_argument("--name", default="replay", help="of the result files")
    made.add_argument("--again", action="store_true", help="also what is saved")
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    runs: list[dict[str, Any]] = []
    try:
        check(args)
        require_means()
        runs, tuning = saved(args)
        with (
            tempfile.TemporaryDirectory() as folder,
            emulated_cluster(args.nodes) as cluster,
        ):
            replays = Replays(args, cluster, Path(folder), tuning)
            for run in replays.all_runs({_which(run) for run in runs}):
                runs.append(run)
                if args.save:  # keep what was measured, whatever follows
                    save(args, replays, runs)
    except (ClusterError, ConfigError, ValueError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    print(table(runs, BASELINE))
    return 1 if any(run["figures"]["errors"] for run in runs) else 0


def check(args: argparse.Namespace) -> None:
    """Check the command line.

    Raises:
        ConfigError: it asks for something impossible.
    """
    if args.nodes < 2 or min(args.slices, args.requests) < 1:
        raise ConfigError("needs at least 2 nodes, 1 slice and 1 request")
    if unknown := [name for name in args.systems.split(",") if name not in SYSTEMS]:
        raise ConfigError(f"unknown system {', '.join(unknown)}; known are {', '.join(SYSTEMS)}")
    if args.save and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--save draws with matplotlib, which is not installed: pip install '.[bench]'"
        )
    slice_of(args.trace, args.slices, args.requests)


def slice_of(trace: str, number: int, requests: int) -> list[Arrival]:
    """Slice `number` of a trace, from its first arrival on.

    Raises:
        ConfigError: the trace is not that long.
    """
    rows = read_trace(trace, limit=(number + 1) * requests)[number * requests :]
    if len(rows) < requests:
        raise ConfigError(f"{trace} has no slice {number} of {requests} requests")
    return rows


def write_slice(rows: Sequence[Arrival], path: Path) -> None:
    """Write a slice as the lines of a Mooncake trace, which the load client reads."""
    start = rows[0].time_s
    lines = [
        json.dumps(
            {
                "timestamp": round((row.time_s - start) * 1e3),
                "input_length": row.prompt_len,
                "output_length": row.output_len,
                "hash_ids": list(row.hash_ids),
            }
        )
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")


class Replays:
    """All servers and loads of one run; slice 0 tunes the baseline and is not measured."""

    def __init__(
        self,
        args: argparse.Namespace,
        cluster: Cluster,
        folder: Path,
        tuning: dict[str, dict[str, float]],
    ) -> None:
        """`tuning` holds mean response seconds by rate and chunk size, as far as they are known."""
        self._args, self._cluster, self._folder = args, cluster, folder
        self._model = stretched(args.model, args.max_model_len, folder)
        self._started = 0
        self.tuning = tuning
        for number in range(args.slices + 1):
            rows = slice_of(args.trace, number, args.requests)
            write_slice(rows, folder / f"slice-{number}.jsonl")

    def all_runs(self, done: Collection[tuple[str, str, int]]) -> Iterator[dict[str, Any]]:
        """Yield runs by rate and system, except those in `done` (`_which`).

        Each server gets all its slices.
        """
        args = self._args
        for rate in parse_rates(args.rates.split(",")):
            name = rate_name(rate)
            left = {
                system: numbers
                for system in (BASELINE, *args.systems.split(","))
                if (
                    numbers := [
                        n for n in range(1, args.slices + 1) if (name, system, n) not in done
                    ]
                )
            }
            if not left:
                continue
            self._cluster.set_link(Link(bits_per_s=rate))
            for system, numbers in left.items():
                flags = (
                    self._sps2(system)
                    if system in SYSTEMS
                    else self._sarathi(self._best_chunk(name))
                )
                for number, figures in self._replayed(flags, numbers):
                    say(f"{name}, {system}, slice {number}: {_short(figures)}")
                    yield {"rate": name, "slice": number, "system": system, "figures": figures}

    def _best_chunk(self, rate: str) -> int:
        """Chunk size with the least mean response time on slice 0."""
        sizes = self._args.chunks.split(",")
        if len(sizes) == 1:
            return int(sizes[0])
        times = self.tuning.setdefault(rate, {})
        for size in sizes:
            if size not in times:
                [(_, figures)] = self._replayed(self._sarathi(int(size)), [0])
                times[size] = (figures["response_s"] or {"mean": float("inf")})["mean"]
        say(f"{rate}: chunks {times}")
        return int(min(sizes, key=times.__getitem__))

    def _sarathi(self, chunk: int) -> list[str]:
        tp = str(self._args.nodes)
        return [
            "--tp",
            tp,
            "--scheduler",
            "sarathi",
            "--override",
            f"scheduler.chunk_tokens={chunk}",
        ]

    def _sps2(self, name: str) -> list[str]:
        return ["--sp", str(self._args.nodes), *SYSTEMS[name]]

    def _replayed(
        self, flags: Sequence[str], slices: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Figures of each slice, served by one server."""
        self._started += 1
        folder = self._folder / f"server-{self._started}"
        folder.mkdir()
        blocks = 8 * self._args.max_model_len // 16  # on each rank: never the limit
        common = ["--model", self._model, "--max-model-len", str(self._args.max_model_len)]
        common += [
            "--num-gpu-blocks-override",
            str(blocks),
            "--no-enable-prefix-caching",
            "--threads",
            "1",
        ]
        common += ["--device", "cpu", "--dtype", "float32"]
        nodes = self._cluster.nodes
        with served_on_nodes([*common, *flags], nodes, _PORT + self._started, folder) as url:
            for number in slices:
                yield number, self._loaded(url, number, folder)

    def _loaded(self, url: str, number: int, folder: Path) -> dict[str, Any]:
        """Observations of the load client, run on the first node."""
        args, output = self._args, folder / f"load-{number}.json"
        command = [
            *self._cluster.nodes[0].prefix,
            *(sys.executable, str(machine.ROOT / "benchmarks" / "serving.py")),
            *("--url", url, "--trace", str(self._folder / f"slice-{number}.jsonl")),
            *("--requests", str(args.requests), "--salt", "replay", "--seeds", str(number)),
            *("--length-scale", str(args.length_scale), "--output-scale", str(args.output_scale)),
            *("--time-scale", str(args.time_scale), "--output", str(output)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not output.is_file():
            raise ClusterError(f"the load client failed: {done.stderr.strip()[-1000:]}")
        [figures] = json.loads(output.read_text())["runs"]
        found: dict[str, Any] = figures
        return found


def saved(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Runs and chunk sizes' seconds in the result file, if it was made with the same settings."""
    path = machine.ROOT / "docs" / "results" / f"{args.name}.json"
    if not args.save or args.again or not path.is_file():
        return [], {}
    content = json.loads(path.read_text())
    if content["settings"] != _settings(args):
        return [], {}
    return content["runs"], content["chunk_sizes_response_s"]


def save(args: argparse.Namespace, replays: Replays, runs: list[dict[str, Any]]) -> None:
    """Write docs/results/NAME.json and .png."""
    from benchmarks.trace_replay.plot import plot

    tuning = replays.tuning
    result = {"settings": _settings(args), "chunk_sizes_response_s": tuning, "runs": runs}
    path = machine.save(args.name, result)
    title = f"{args.trace} x {args.length_scale:g}, {args.nodes} nodes"
    plot(runs, BASELINE, path.with_suffix(".png"), title=title)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings on which the figures depend."""
    return {k: v for k, v in vars(args).items() if k not in ("save", "name", "again")}


def _which(run: Mapping[str, Any]) -> tuple[str, str, int]:
    return run["rate"], run["system"], run["slice"]


def _short(figures: dict[str, Any]) -> str:
    ttft, tbt, total = (
        (figures[name] or {}).get("mean", 0.0) for name in ("ttft_s", "tbt_s", "response_s")
    )
    return f"TTFT {ttft:.3g} s, TBT {tbt * 1e3:.3g} ms, response {total:.3g} s"


if __name__ == "__main__":
    sys.exit(main())
