"""Load on a server of the OpenAI API: a replayed request trace or Poisson arrivals.

    python benchmarks/serving.py --url http://127.0.0.1:8000 --trace mooncake --requests 100
        --length-scale 0.02
    python benchmarks/serving.py --url http://127.0.0.1:8000 --poisson 2 --lengths 500:64,2000:16
        --seeds 0 1 2

    TTFT      first token - when the request was due
    TBT       gap between two tokens
    TPOT      mean gap of a request
    goodput   requests/s within --slo-ttft and --slo-tbt

Requests are sent when they are due, whatever became of earlier ones; --max-in-flight bounds them,
and then waiting counts. Lengths count tokens with --prompts ids (the default), else characters or
words: the server's own counts are in the result. Prompts that the model's context cannot hold are
left out and counted. Exit codes: 0 all requests were answered, 1 some failed, 2 it could not run.
Decides what is run; `load.client` handles a single request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.load.client import Target, ask, open_client
from benchmarks.load.figures import figures
from benchmarks.load.options import found_target, parser, workload
from benchmarks.load.replay import Replay, replay
from benchmarks.load.requests import TimedRequest
from benchmarks.load.table import table
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.figures import Limits


def main(arguments: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(arguments)
    try:
        target, max_len = found_target(args)
        workloads = {seed: workload(args, seed, max_len) for seed in args.seeds}
        if not any(requests for requests, _ in workloads.values()):
            raise ConfigError(
                f"no request of the workload fits {max_len} tokens: use --length-scale"
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    limits = Limits(ttft_s=args.slo_ttft, tbt_s=args.slo_tbt)
    runs: dict[str, Replay] = {}
    results: list[dict[str, Any]] = []
    for seed, (requests, left_out) in workloads.items():
        run = asyncio.run(played(requests, target, args))
        runs[f"seed {seed}"] = run
        results.append({"seed": seed, "left_out": left_out} | figures(run, limits))
        print(table(results[-1]))
    if args.output is not None:
        write(args, target, runs, results)
    return 1 if any(result["errors"] for result in results) else 0


async def played(requests: list[TimedRequest], target: Target, args: argparse.Namespace) -> Replay:
    async with open_client(target.timeout_s) as client:
        return await replay(
            requests,
            lambda request, due: ask(client, target, request, due),
            max_in_flight=args.max_in_flight,
            timeout_s=target.timeout_s,
        )


def write(
    args: argparse.Namespace,
    target: Target,
    runs: dict[str, Replay],
    results: list[dict[str, Any]],
) -> None:
    """Write the JSON file and the picture, neither with the API key."""
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("api_key", "output") and value is not None
    }
    record = {
        "command": f"python benchmarks/serving.py {_shown(sys.argv[1:])}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "settings": settings | {"model": target.model},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record | {"runs": results}, indent=1) + "\n")
    from benchmarks.load.plot import plot

    arrivals = "Poisson" if args.poisson is not None else args.trace or "azure-code"
    plot(
        runs,
        args.output.with_suffix(".png"),
        title=f"{target.model}, {arrivals}",
        limits={"ttft_s": args.slo_ttft, "tbt_s": args.slo_tbt},
    )
    print("written:", args.output)


def _shown(arguments: list[str]) -> str:
    """Command line without the key, which a result file must not have."""
    shown = [
        "KEY" if before == "--api-key" else re.sub("^--api-key=.*", "--api-key=KEY", argument)
        for before, argument in zip(["", *arguments], arguments, strict=False)
    ]
    return shlex.join(shown)


if __name__ == "__main__":
    sys.exit(main())
