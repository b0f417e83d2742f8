"""Cost of the HTTP server: the same prompts through it and through offline generation.

    python benchmarks/api_overhead.py [--requests 64] [--at-once 16] [--new-tokens 64] [--save]

Both keep --at-once requests in flight: a server with --max-num-seqs of them and as many clients,
which wait for whole answers or stream them; and LLM.generate in a process of its own with the same
engine options. They take turns, so that noise of the machine hits all of them. The ratio is the
server's output tokens per second over those of offline generation. Clients run on the same machine
and count against the server. CPU time per token is reported for the server's processes and for
those of offline generation: other load on the machine hardly moves it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.load.process import cpu_seconds, served
from benchmarks.overhead.clients import answered, mixed_requests
from benchmarks.overhead.offline import OfflineProcess


def main() -> int:
    args = parser().parse_args()
    asks = mixed_requests(args.requests, args.shortest, args.longest, args.new_tokens)
    flags = [*shlex.split(args.flags), "--max-num-seqs", str(args.at_once)]
    flags += ["--threads", str(args.threads)]
    degrees = ["--tp", str(args.tp), "--sp", str(args.sp)]
    with (
        tempfile.TemporaryDirectory() as folder,
        OfflineProcess(args.model, [*degrees, *flags]) as offline,
        served(
            ["--model", args.model, *degrees, *flags],
            Path(folder) / "server.log",
        ) as server,
    ):
        rounds = taken_in_turn(
            {
                "offline": measured(
                    lambda: offline.seconds(asks),
                    lambda: cpu_seconds(offline.pid),
                ),
                "server": measured(
                    lambda: asyncio.run(answered(server, asks, args.at_once, stream=False)),
                    server.cpu_s,
                ),
                "server, streaming": measured(
                    lambda: asyncio.run(answered(server, asks, args.at_once, stream=True)),
                    server.cpu_s,
                ),
            },
            args.repeats,
        )
    result = summary(rounds, sum(new_tokens for _, new_tokens in asks))
    result["settings"] = {n: v for n, v in vars(args).items() if n not in ("save", "name")}
    print(json.dumps(result, indent=1))
    if args.save:
        print("written:", machine.save(args.name, result))
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", default="sps2-tiny")
    found.add_argument("--tp", type=int, default=1)
    found.add_argument("--sp", type=int, default=1)
    found.add_argument(
        "--flags",
        default="--dtype float32 --num-gpu-blocks-override 2048 "
        "--no-enable-prefix-caching --tbt-target-ms 0",
        help="of both engines; by default both prefill without giving way, so that they take the "
        "same steps",
    )
    found.add_argument("--requests", type=int, default=64)
    found.add_argument("--at-once", type=int, default=16)
    found.add_argument("--new-tokens", type=int, default=64, help="mean")
    found.add_argument("--shortest", type=int, default=100, help="characters of a prompt")
    found.add_argument("--longest", type=int, default=1500)
    found.add_argument("--threads", type=int, default=1, help="CPU threads per rank")
    found.add_argument("--repeats", type=int, default=7)
    found.add_argument("--name", default="api-overhead", help="of the result file")
    found.add_argument("--save", action="store_true", help="write docs/results/NAME.json")
    return found


@dataclass(frozen=True, slots=True)
class Took:
    """One run of a contestant: seconds to the last answer, and CPU seconds of its processes."""

    seconds: float
    cpu_s: float


def measured(run: Callable[[], float], cpu_s: Callable[[], float]) -> Callable[[], Took]:
    def took() -> Took:
        before = cpu_s()
        return Took(run(), cpu_s() - before)

    return took


def taken_in_turn(
    contestants: dict[str, Callable[[], Took]], repeats: int
) -> dict[str, list[Took]]:
    """Times of every contestant over `repeats` rounds, after one warm-up; the order alternates."""
    found: dict[str, list[Took]] = {name: [] for name in contestants}
    for number in range(repeats + 1):
        names = list(contestants) if number % 2 else list(reversed(contestants))
        for name in names:
            took = contestants[name]()
            if number:
                found[name].append(took)
    return found


def summary(rounds: dict[str, list[Took]], tokens: int) -> dict[str, Any]:
    """Median tokens per second, and the server's share of offline speed (median and range)."""
    seconds = {name: [took.seconds for took in each] for name, each in rounds.items()}
    ratios = {
        name: sorted(base / mine for base, mine in zip(seconds["offline"], each, strict=True))
        for name, each in seconds.items()
        if name != "offline"
    }
    return {
        "output_tokens_per_s": {
            name: tokens / statistics.median(each) for name, each in seconds.items()
        },
        "ratio": {name: statistics.median(each) for name, each in ratios.items()},
        "ratio_range": {name: [each[0], each[-1]] for name, each in ratios.items()},
        "cpu_us_per_token": {
            name: 1e6 * statistics.median(took.cpu_s for took in each) / tokens
            for name, each in rounds.items()
        },
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
