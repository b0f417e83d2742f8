"""Flags of the load client, the server that they name, and the requests of a run."""

from __future__ import annotations

import argparse
import json
import secrets
from pathlib import Path

import httpx

from benchmarks.load.client import Target, base_of
from benchmarks.load.requests import TimedRequest, fitting, id_range, scaled, with_prompts
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.poisson import poisson
from sps2_mega.simulator.trace_files import BUNDLED, read_trace


def parser(description: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
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
    """Server to load, and its context length if it reports one.

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
    """Requests of one run, and how many were left out as too long.

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
    # Each run has its own prompts: it must not find an earlier run's in the server's cache.
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
