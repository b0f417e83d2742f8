"""What the HTTP server costs: the same prompts through it and through offline generation, side by side.

    python tools/bench/api_overhead.py [--requests 64] [--at-once 16] [--new-tokens 64] [--save]

Both keep --at-once requests under way: a server with --max-num-seqs of them and as many clients, waiting for whole answers
or streaming them; and LLM.generate in a process of its own with the same engine options. They take turns, so that a
noise of the machine meets all of them. The ratio is the server's output tokens per second over those of offline
generation; clients run on the same machine and count against the server. The CPU time that each token takes in the
server's processes and in those of offline generation is told too: other work on the machine hardly moves it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench import machine
from tools.bench.api_overhead_offline import OfflineProcess
from tools.bench.generate import source_prompts
from tools.bench.serving_process import RunningServer, cpu_seconds, served
from tools.bench.sse import events


def main() -> int:
    args = parser().parse_args()
    texts = source_prompts(args.requests, args.shortest, args.longest)
    texts = [texts[i % len(texts)] for i in range(args.requests)]
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
                    lambda: offline.seconds(texts, args.new_tokens),
                    lambda: cpu_seconds(offline.pid),
                ),
                "server": measured(
                    lambda: asyncio.run(asked(server, texts, args, stream=False)), server.cpu_s
                ),
                "server, streaming": measured(
                    lambda: asyncio.run(asked(server, texts, args, stream=True)), server.cpu_s
                ),
            },
            args.repeats,
        )
    result = summary(rounds, len(texts) * args.new_tokens)
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
        "--flags", default="--dtype float32 --num-kv-blocks 2048 --no-prefix-caching"
    )
    found.add_argument("--requests", type=int, default=64)
    found.add_argument("--at-once", type=int, default=16)
    found.add_argument("--new-tokens", type=int, default=64)
    found.add_argument("--shortest", type=int, default=100, help="characters of a prompt")
    found.add_argument("--longest", type=int, default=1500)
    found.add_argument("--threads", type=int, default=1, help="CPU threads per rank")
    found.add_argument("--repeats", type=int, default=7)
    found.add_argument("--name", default="api-overhead", help="of the result file")
    found.add_argument("--save", action="store_true", help="write docs/results/NAME.json")
    return found


@dataclass(frozen=True, slots=True)
class Took:
    """One contestant's run: until all was answered, and computed meanwhile by its processes."""

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
    """What each took, `repeats` times after one warm-up; the order turns around from round to round."""
    found: dict[str, list[Took]] = {name: [] for name in contestants}
    for number in range(repeats + 1):
        names = list(contestants) if number % 2 else list(reversed(contestants))
        for name in names:
            took = contestants[name]()
            if number:
                found[name].append(took)
    return found


async def asked(
    server: RunningServer, texts: list[str], args: argparse.Namespace, *, stream: bool
) -> float:
    """Seconds until all are answered.

    Raises:
        RuntimeError: an answer has another number of tokens than was asked for.
    """
    waiting = iter(texts)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, trust_env=False) as client:

        async def work() -> None:
            for text in waiting:  # all workers take from the same iterator
                body = {
                    "model": server.model,
                    "prompt": text,
                    "max_tokens": args.new_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": stream,
                }
                tokens = await (_streamed if stream else _whole)(client, body)
                if tokens != args.new_tokens:
                    raise RuntimeError(f"{tokens} tokens came instead of {args.new_tokens}")

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(args.at_once)))
        return time.perf_counter() - began


async def _whole(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


async def _streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    usage: dict[str, Any] = {}
    wanted = body | {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=wanted) as response:
        response.raise_for_status()
        async for event in events(response):
            usage = event.get("usage") or usage
    return int(usage["completion_tokens"])


def summary(rounds: dict[str, list[Took]], tokens: int) -> dict[str, Any]:
    """Tokens per second (medians), and the server's share of offline speed: median and range over rounds."""
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
