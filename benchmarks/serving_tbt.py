"""Time between tokens of running requests, in quiet and during a long prefill, per scheduler.

    python benchmarks/serving_tbt.py [--prompt-len 8192] [--decodes 4] [--save]
    python benchmarks/serving_tbt.py --system "mine=--sp 2 --tbt-target-ms 20"
        --system "other=--tp 2 --scheduler sarathi"

Every system is a server of its own, started in turn with the same weights, and gets the same
requests, --rounds times in alternation. {target} in flags stands for --target-ms, or for --factor
times the quiet median of the first system. The bundled model's weights get a context long enough
for the prompts: their output is no text any more, but takes the same time. Of the systems named
sarathi-N the best one is marked: the shortest TTFT among those that keep the disturbed p99 within 3
times the quiet median, else the shortest p99.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.load.client import Target
from benchmarks.load.figures import spread
from benchmarks.load.process import served
from benchmarks.load.stretched_model import stretched
from benchmarks.load.tbt_run import Trace, Watched, watch

LIMIT = 3.0  # disturbed p99 over quiet median
SYSTEMS = (
    "whole=--sp 2 --tbt-target-ms 0",
    "sps2=--sp 2 --tbt-target-ms {target}",
    *(
        f"sarathi-{size}=--tp 2 --scheduler sarathi --override scheduler.chunk_tokens={size}"
        for size in (32, 64, 128, 256)
    ),
)


def main() -> int:
    args = parser().parse_args()
    systems = dict(text.split("=", 1) for text in args.system or SYSTEMS)
    trace = Trace(
        decodes=args.decodes,
        decode_prompt=args.decode_prompt,
        prompts=args.prompts,
        prompt_len=args.prompt_len,
        pause_s=args.pause,
        output_len=args.context - args.decode_prompt - 1,
        timeout_s=args.timeout,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = stretched(args.model, args.context, Path(folder)) if args.stretch else args.model
        runs: dict[str, list[Watched]] = {name: [] for name in systems}
        target_ms = args.target_ms
        for number in range(args.rounds):
            for name, text in systems.items():
                flags = [item.format(target=target_ms) for item in shlex.split(text)]
                watched = one(model, [*flags, *shlex.split(args.flags)], trace, Path(folder))
                runs[name].append(watched)
                if target_ms is None:
                    target_ms = round(1e3 * args.factor * statistics.median(watched.parted()[0]), 1)
                print(f"round {number + 1}, {name}: {line(figures([watched]))}", flush=True)
    result = {
        "trace": {name: getattr(trace, name) for name in trace.__dataclass_fields__},
        "target_ms": target_ms,
        "flags": systems,
        "systems": {name: figures(each) for name, each in runs.items()},
    }
    result["best_sarathi"] = best_of(result["systems"], "sarathi-")
    print(json.dumps(result, indent=1))
    if args.save:
        from benchmarks.load.tbt_plot import plot

        path = machine.save(args.name, result)
        plot(runs, result, path.with_suffix(".png"))
        print("written:", path)
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--system", action="append", metavar="NAME=FLAGS", help="of launch/serve.py")
    found.add_argument("--model", default="sps2-tiny")
    found.add_argument(
        "--no-stretch", dest="stretch", action="store_false", help="leave the context as it is"
    )
    found.add_argument("--context", type=int, default=32768, help="tokens, for --model stretched")
    found.add_argument(
        "--flags",
        default="--device cpu --dtype float32 "
        "--num-gpu-blocks-override 6144 --no-enable-prefix-caching",
    )
    found.add_argument("--prompt-len", type=int, default=8192)
    found.add_argument("--prompts", type=int, default=3, help="long ones per round")
    found.add_argument("--decodes", type=int, default=4)
    found.add_argument("--decode-prompt", type=int, default=64)
    found.add_argument("--pause", type=float, default=3.0, help="seconds of quiet around prefills")
    found.add_argument("--target-ms", type=float)
    found.add_argument("--factor", type=float, default=2.5)
    found.add_argument("--rounds", type=int, default=2)
    found.add_argument("--timeout", type=float, default=300.0)
    found.add_argument("--name", default="serving-tbt", help="of the result files")
    found.add_argument("--save", action="store_true", help="write docs/results/NAME.json and .png")
    return found


def one(model: str, flags: list[str], trace: Trace, folder: Path) -> Watched:
    """Run one server from start to end."""
    with served(["--model", model, *flags], folder / "server.log") as server:
        # Log-probabilities make every token an event, also one that is no text by itself.
        target = Target(
            url=server.url,
            model=server.model,
            timeout_s=trace.timeout_s,
            extra={"ignore_eos": True, "logprobs": 0},
        )
        return asyncio.run(watch(target, trace))


def figures(runs: list[Watched]) -> dict[str, Any]:
    """Figures of all rounds together, in seconds."""
    parts = [run.parted() for run in runs]
    quiet = [gap for part, _ in parts for gap in part]
    disturbed = [gap for _, part in parts for gap in part]
    found: dict[str, Any] = {
        "quiet_tbt_s": spread(quiet),
        "disturbed_tbt_s": spread(disturbed),
        "ttft_s": spread([over - due for run in runs for due, over in run.prefills]),
        "disturbed_gaps": len(disturbed),
    }
    if quiet and disturbed:
        p99 = found["disturbed_tbt_s"]["p99"]
        found["p99_over_quiet_p50"] = p99 / found["quiet_tbt_s"]["p50"]
        found["p99_over_quiet_p99"] = p99 / found["quiet_tbt_s"]["p99"]
    return found


def best_of(systems: dict[str, dict[str, Any]], prefix: str) -> str | None:
    """Name of the best tuned system with this prefix; None without any."""
    rivals = {name: found for name, found in systems.items() if name.startswith(prefix)}
    keep = {n: f for n, f in rivals.items() if f.get("p99_over_quiet_p50", LIMIT + 1) <= LIMIT}
    if keep:
        return min(keep, key=lambda name: keep[name]["ttft_s"]["mean"])
    measured = {name: found for name, found in rivals.items() if found["disturbed_tbt_s"]}
    if not measured:
        return None
    return min(measured, key=lambda name: measured[name]["disturbed_tbt_s"]["p99"])


def line(found: dict[str, Any]) -> str:
    def ms(name: str) -> str:
        values = found[name]
        if values is None:
            return "-"
        return "/".join(f"{1e3 * values[key]:.1f}" for key in ("p50", "p99", "max"))

    return (
        f"TBT p50/p99/max quiet {ms('quiet_tbt_s')} ms, disturbed {ms('disturbed_tbt_s')} ms, "
        f"p99 {found.get('p99_over_quiet_p50', float('nan')):.1f} times the quiet median; "
        f"TTFT {ms('ttft_s')} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
