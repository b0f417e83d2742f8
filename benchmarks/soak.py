"""Soak test of a server in mixed requests, which checks every answer, its KV blocks and its memory.

    python benchmarks/soak.py --requests 2000 --sp 2                 the bundled model on two ranks
    python benchmarks/soak.py --model DIR --tp 2 --flags "--dtype bfloat16"

A fifth of the requests is abandoned midway, a tenth is invalid; the others are streamed or not,
given as text, token ids or several at once, with samples, stop strings, echo and log-probabilities.
Every finished text must equal that of offline generation. Afterwards no block may be in use, and
resident memory of all server processes must have stayed within 5 % of its median in the second
half. Exit codes: 0 all was right, 1 it was not, 2 it could not run.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.load.process import RunningServer, served
from benchmarks.soaking.answers import known_answers
from benchmarks.soaking.cases import Answer, CaseMix
from benchmarks.soaking.client import SoakResult, soak
from benchmarks.soaking.state import MemoryCurve, metrics, state_faults

_SAMPLES = 200  # of the memory, over all requests


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sps2-tiny")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=24, help="clients")
    parser.add_argument("--prompts", type=int, default=32, help="different ones")
    parser.add_argument("--longest", type=int, default=1500, help="characters of a prompt")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument(
        "--flags",
        default="--dtype float32 --num-gpu-blocks-override 1024",
        help="more of the engine",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the verdict")
    parser.add_argument("--log", type=Path, help="the server's (default: shown if it ends early)")
    args = parser.parse_args()
    flags = shlex.split(args.flags)
    degrees = ["--tp", str(args.tp), "--sp", str(args.sp)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            answers = known_answers(
                args.model,
                flags,
                Path(folder),
                num_prompts=args.prompts,
                longest=args.longest,
            )
            print(f"{len(answers)} answers are known; soaking", flush=True)
            log = args.log or Path(folder) / "server.log"
            with served(["--model", args.model, *degrees, *flags], log) as server:
                verdict = run(server, answers, args)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    text = json.dumps(verdict, indent=1)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    return 1 if verdict["num_faults"] else 0


def run(server: RunningServer, answers: list[Answer], args: argparse.Namespace) -> dict[str, Any]:
    """Soak a running server; return what was done and what was wrong."""
    described = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"][0]
    mix = CaseMix(
        answers=[with_ids(answer, server.url) for answer in answers],
        model=server.model,
        max_model_len=described["max_model_len"],
        source=random.Random(args.seed),
    )
    cases = mix.draw(args.requests)
    memory, began = MemoryCurve(), time.monotonic()
    every = max(1, args.requests // _SAMPLES)

    def note(done: int) -> None:
        if done % every == 0:
            memory.add(done, server.resident_bytes())

    result = asyncio.run(soak(server.url, cases, at_once=args.at_once, on_done=note))
    seconds = time.monotonic() - began
    code = server.process.poll()
    if code is not None:
        end = server.log.read_text(errors="replace")[-4000:]
        raise RuntimeError(
            f"the server ended with exit code {code} after {result.done} requests, "
            f"{len(result.faults)} "
            f"with faults, the first of them: {result.faults[:3]}\n{end}"
        )
    faults = [*result.faults, *state_faults(server.url), *memory.faults(args.requests)]
    return _verdict(server, result, faults, memory, seconds, args)


def with_ids(answer: Answer, url: str) -> Answer:
    """The answer with the prompt's token ids added, from the server's tokenizer."""
    asked = {"prompt": answer.fields["prompt"]}
    tokens = httpx.post(f"{url}/tokenize", json=asked, trust_env=False).json()["tokens"]
    return dataclasses.replace(answer, prompt_ids=tokens)


def _verdict(
    server: RunningServer,
    result: SoakResult,
    faults: list[str],
    memory: MemoryCurve,
    seconds: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    below, above = memory.spread(args.requests)
    generated = metrics(server.url, ("generation_tokens_total", "request_aborted_total"))
    return {
        "requests": result.done,
        "seconds": round(seconds, 1),
        "endings": dict(result.endings),
        "shapes": dict(result.shapes),
        "tokens_checked": result.tokens,
        **{name: int(value) for name, value in generated.items()},
        "resident_mib": memory.outline(),
        "second_half_around_median": [round(below, 4), round(above, 4)],
        "num_faults": len(faults),
        "faults": faults[:20],
    }


if __name__ == "__main__":
    sys.exit(main())
