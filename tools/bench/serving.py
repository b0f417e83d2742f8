"""Replays a request trace, or Poisson arrivals, against a server of the OpenAI API and reports what its clients saw.

    python tools/bench/serving.py --url http://127.0.0.1:8000 --trace mooncake --requests 100 --length-scale 0.02
    python tools/bench/serving.py --url http://127.0.0.1:8000 --poisson 2 --lengths 500:64,2000:16 --seeds 0 1 2

    TTFT      first token - when the request was due        TBT    gap between two tokens
    TPOT      mean gap of a request                         goodput    requests/s within --slo-ttft and --slo-tbt

Requests are sent when they are due, whatever came of earlier ones; --max-in-flight bounds them, and then waiting counts.
Lengths count tokens with --prompts ids (the default), else characters or words: the server's own counts are in the
result. Prompts that the model's context cannot hold are left out and counted. Exit codes: 0 all requests were answered,
1 some failed, 2 it could not run. Decides what is run; how one request goes is `serving_client`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import secrets
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.figures import Limits
from sps2_mega.simulator.poisson import poisson
from sps2_mega.simulator.trace_files import BUNDLED, read_trace
from tools.bench import machine
from tools.bench.serving_client import Target, ask, base_of, open_client
from tools.bench.serving_figures import figures
from tools.bench.serving_replay import Replay, replay
from tools.bench.serving_requests import TimedRequest, fitting, id_range, scaled, with_prompts
from tools.bench.serving_table import table


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
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


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server = found.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:8000", help="with or without /v1")
    server.add_argument("--model", help="default: the first one that the server lists")
    server.add_argument("--api-key", default="none")
    server.add_argument("--api", choices=("completions", "chat"), default="completions")
    server.add_argument("--max-model-len", type=int, help="default: what the server says")
    server.add_argument(
        "--no-ignore-eos", action="store_true", help="for servers that refuse the field ignore_eos"
    )
    server.add_argument("--extra", default="{}", help="JSON object: more fields of every request")
    what = found.add_argument_group("workload")
    what.add_argument("--trace", help=f"{', '.join(BUNDLED)}, or a file (default: azure-code)")
    what.add_argument("--requests", type=int, default=200, help="of the trace's beginning")
    what.add_argument("--poisson", type=float, metavar="RATE", help="requests/s, not the trace's")
    what.add_argument("--lengths", help="with --poisson, no trace: IN:OUT,IN:OUT,.. in tokens")
    what.add_argument("--time-scale", type=float, default=1.0, help="0.5: twice as fast")
    what.add_argument("--length-scale", type=float, default=1.0, help="of prompts")
    what.add_argument("--output-scale", type=float, default=1.0, help="of outputs")
    what.add_argument("--prompts", choices=("ids", "characters", "words"))
    what.add_argument("--token-ids", default="32-126", metavar="LOW-HIGH", help="to draw from")
    what.add_argument("--salt", help="equal salts give equal prompts (default: new ones)")
    what.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    measuring = found.add_argument_group("measuring")
    measuring.add_argument("--max-in-flight", type=int, help="requests at a time")
    measuring.add_argument("--timeout", type=float, default=600.0, help="seconds per request")
    measuring.add_argument("--slo-ttft", type=float, default=5.0, help="seconds, for goodput")
    measuring.add_argument("--slo-tbt", type=float, default=0.1, help="seconds, for goodput")
    measuring.add_argument("--output", type=Path, help="JSON file; a picture is put beside it")
    return found


def found_target(args: argparse.Namespace) -> tuple[Target, int | None]:
    """Whom to ask, and how long a context the server has, where it says so.

    Raises:
        ConfigError: nobody answers there, or an option makes no sense.
    """
    try:
        extra = json.loads(args.extra)
    except ValueError as error:
        raise ConfigError(f"--extra must be a JSON object: {error}") from None
    if not isinstance(extra, dict):
        raise ConfigError(f"--extra must be a JSON object, got {args.extra[:80]!r}")
    try:
        answer = httpx.get(
            f"{base_of(args.url)}/models",
            headers={"Authorization": f"Bearer {args.api_key}"},
            timeout=30,
            trust_env=False,
        )
        answer.raise_for_status()
        models = answer.json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ConfigError(f"no models are listed at {base_of(args.url)}: {error}") from None
    known = {model["id"]: model for model in models}
    name = args.model or next(iter(known), "")
    if args.prompts == "ids" and args.api == "chat":
        raise ConfigError("--api chat takes texts: use --prompts words or characters")
    target = Target(
        url=args.url,
        model=name,
        api_key=args.api_key,
        api=args.api,
        timeout_s=args.timeout,
        extra=({} if args.no_ignore_eos else {"ignore_eos": True}) | extra,
    )
    return target, args.max_model_len or known.get(name, {}).get("max_model_len")


def workload(
    args: argparse.Namespace, seed: int, max_len: int | None
) -> tuple[list[TimedRequest], int]:
    """The requests of one run, and how many were left out because they are too long.

    Raises:
        ConfigError: the trace cannot be read, or a number makes no sense.
    """
    if args.requests < 1 or (args.max_in_flight is not None and args.max_in_flight < 1):
        raise ConfigError("--requests and --max-in-flight must be >= 1")
    wanted = scaled(
        _arrivals(args, seed),
        time=args.time_scale,
        length=args.length_scale,
        output=args.output_scale,
    )
    kept = fitting(wanted, max_len)
    # Each run has prompts of its own: it must not find an earlier one's in the server's cache.
    requests = with_prompts(
        kept,
        kind=args.prompts or ("words" if args.api == "chat" else "ids"),
        ids=id_range(args.token_ids),
        salt=f"{args.salt} {seed}",
    )
    return requests, len(wanted) - len(kept)


def _arrivals(args: argparse.Namespace, seed: int) -> list[Arrival]:
    args.salt = args.salt or secrets.token_hex(4)
    if args.poisson is None:
        if args.lengths is not None:
            raise ConfigError("--lengths needs --poisson RATE")
        return read_trace(args.trace or "azure-code", limit=args.requests, seed=seed)
    if args.lengths is not None:
        lengths = _lengths(args.lengths)
    else:
        rows = read_trace(args.trace or "azure-code", limit=args.requests, seed=seed)
        lengths = [(row.prompt_len, row.output_len) for row in rows]
    return poisson(lengths, rate=args.poisson, count=args.requests, seed=seed)


def _lengths(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [item.split(":") for item in text.split(",")]
        return [(int(prompt), int(output)) for prompt, output in pairs]
    except ValueError:
        raise ConfigError(f"--lengths must be IN:OUT,IN:OUT,.., got {text!r}") from None


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
    """The JSON file and the picture. A key is a secret: neither has it."""
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("api_key", "output") and value is not None
    }
    record = {
        "command": f"python tools/bench/serving.py {_shown(sys.argv[1:])}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "settings": settings | {"model": target.model},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record | {"runs": results}, indent=1) + "\n")
    from tools.bench.serving_plot import plot

    plot(
        runs,
        args.output.with_suffix(".png"),
        title=f"{target.model}, {args.trace or 'azure-code' if args.poisson is None else 'Poisson'}",
        limits={"ttft_s": args.slo_ttft, "tbt_s": args.slo_tbt},
    )
    print("written:", args.output)


def _shown(arguments: list[str]) -> str:
    """The command line, without the key that a result file must not have."""
    shown = [
        "KEY" if before == "--api-key" else re.sub("^--api-key=.*", "--api-key=KEY", argument)
        for before, argument in zip(["", *arguments], arguments, strict=False)
    ]
    return shlex.join(shown)


if __name__ == "__main__":
    sys.exit(main())
