"""Holds the planner against an exhaustive sweep: 20 combinations of model, hardware and trace that nothing was tuned on.

    python tools/plan_sweep.py [--only NAME ..] [--jobs 2]

The planner (tools/plan.py) sees the first part of a trace and chooses. The next part, of as many requests, is then served by
its choice and by every setting there is (tools.simulation.grid); regret is what the choice lacks of the best goodput
there. Writes docs/results/planner-sweep.json and a table of docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival, scaled
from sps2_mega.simulator.figures import Limits
from sps2_mega.simulator.hardware import load_hardware
from sps2_mega.simulator.line_up import Place
from sps2_mega.simulator.trace_files import read_trace
from tools import plan
from tools.simulation.document import EVALUATION, ROOT, with_part
from tools.simulation.grid import everything
from tools.simulation.setting import layout_of, rounded

OUTPUT = ROOT / "docs" / "results" / "planner-sweep.json"
BEGIN, END = "<!-- planner: made by tools/plan_sweep.py -->", "<!-- end of planner -->"
WITHIN = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """`rate` and `length` times the trace's; limits in seconds."""

    model: str
    hardware: str
    nodes: int
    trace: str
    rate: float
    length: float = 1.0
    link: str | None = None
    ttft_s: float = 5.0
    tbt_s: float = 0.1
    requests: int = 40

    @property
    def name(self) -> str:
        over = f" over {self.link}" if self.link else ""
        longer = f" x {self.length:g}" if self.length != 1 else ""
        gpus = f"{self.nodes} x 8 {self.hardware}{over}"
        return f"{self.model}, {gpus}, {self.trace}{longer} at {self.rate:g}"


def _c(model: str, hardware: str, nodes: int, trace: str, rate: float, **more: Any) -> Combination:
    return Combination(model=model, hardware=hardware, nodes=nodes, trace=trace, rate=rate, **more)


COMBINATIONS = (
    _c("llama-3-8b", "h100", 1, "mooncake", 1.0),
    _c("llama-3-8b", "h100", 1, "azure-code", 4.0),
    _c("llama-3-8b", "h200", 2, "mooncake-synthetic", 2.0),
    _c("llama-3-8b", "a100-80g", 1, "azure-conversation", 2.0),
    _c("llama-3-8b", "a100-80g", 2, "mooncake", 2.0, link="rdma-100g"),
    _c("llama-3-8b", "b200", 1, "servegen", 2.0),
    _c("mistral-7b", "a100-80g", 1, "mooncake-synthetic", 0.5),
    _c("mistral-7b", "h100", 2, "azure-code", 2.0, length=4.0),
    _c("mistral-7b", "h200", 1, "azure-conversation", 4.0),
    _c("mistral-7b", "h100", 2, "mooncake", 4.0, link="ethernet-25g"),
    _c("qwen3-8b", "h100", 1, "mooncake-synthetic", 1.0, length=2.0),
    _c("qwen3-8b", "h200", 1, "servegen", 1.0),
    _c("yi-34b", "h100", 1, "mooncake", 0.5),
    _c("yi-34b", "h200", 2, "azure-code", 1.0, length=8.0, ttft_s=10.0),
    _c("yi-34b", "a100-80g", 2, "azure-conversation", 1.0),
    _c("yi-34b", "b200", 1, "mooncake-synthetic", 0.5, ttft_s=10.0),
    _c("llama-3.1-70b", "h100", 2, "mooncake", 0.5, ttft_s=10.0),
    _c("llama-3.1-70b", "h200", 1, "azure-code", 1.0),
    _c("llama-3.1-70b", "h200", 2, "mooncake-synthetic", 0.25, ttft_s=10.0),
    _c("llama-3.1-70b", "b200", 2, "azure-code", 1.0, length=4.0, link="rdma-100g"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", help="these, by number from 1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at the same time")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="elsewhere: no document")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    wanted = [number - 1 for number in args.only or range(1, len(COMBINATIONS) + 1)]
    if not all(0 <= number < len(COMBINATIONS) for number in wanted) or args.jobs < 1:
        print(
            f"plan_sweep: --only takes 1 to {len(COMBINATIONS)}, --jobs at least 1", file=sys.stderr
        )
        return 2
    kept = args.output.is_file() and args.only is not None
    rows = {row["name"]: row for row in (_stored(args.output) if kept else [])}
    with ProcessPoolExecutor(max_workers=args.jobs) as pool:
        waiting = [pool.submit(swept, COMBINATIONS[number]) for number in wanted]
        for done in tqdm(as_completed(waiting), total=len(waiting), disable=args.quiet):
            row = done.result()
            rows[row["name"]] = row
            ordered = [rows[each.name] for each in COMBINATIONS if each.name in rows]
            # What is done is kept, whatever comes next.
            args.output.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")
    print(section(ordered))
    if args.output == OUTPUT:
        write_document()
    return 0


def swept(combination: Combination) -> dict[str, Any]:
    """One row: the planner's choice on the first part, and it and all others on the second.

    Raises:
        ConfigError: a name is unknown, or nothing fits.
    """
    place, seen, coming, limits = _problem(combination)
    chosen = plan.ranked(place, seen, limits)[0].system
    grid = everything(plan.settings(place, exact=False), place)
    if chosen not in grid:
        grid.append(chosen)
    found = plan.in_order([plan.tried(system, place, coming, limits) for system in grid])
    ours = next(each for each in found if each.system == chosen)
    best = found[0]
    goodput = max(each.figures["goodput"] for each in found)
    regret = 1.0 - ours.figures["goodput"] / goodput if goodput else 0.0
    row = {
        "name": combination.name,
        "combination": dataclasses.asdict(combination),
        "settings": len(grid),
        "chosen": f"{chosen.name}: {layout_of(chosen)}",
        "best": f"{best.system.name}: {layout_of(best.system)}",
        "goodput": ours.figures["goodput"],
        "best_goodput": goodput,
        "regret": regret,
        "response_s": _response(ours),
        "best_response_s": _response(best),
        "place": found.index(ours) + 1,
    }
    result: dict[str, Any] = rounded(row)
    return result


def section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the stored rows."""
    good = sum(row["regret"] <= WITHIN for row in rows)
    lines = [
        "| combination | settings | chosen | best | goodput, chosen / best | lacks | response, chosen / best |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goodput = f"{row['goodput']:.3g} / {row['best_goodput']:.3g} per s"
        response = f"{row['response_s']:.3g} / {row['best_response_s']:.3g} s"
        lines.append(
            f"| {row['name']} | {row['settings']} | {row['chosen']} | {row['best']} | {goodput} "
            f"| {row['regret']:.1%} | {response} |"
        )
    lines += ["", f"Within {WITHIN:.0%} of the best goodput: {good} of {len(rows)}."]
    return "\n".join(lines)


def write_document() -> None:
    EVALUATION.write_text(written(EVALUATION.read_text()))


def written(text: str) -> str:
    """The document with the table of what is stored."""
    return with_part(text, BEGIN, END, section(_stored()))


def _stored(path: Path = OUTPUT) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def _problem(
    combination: Combination,
) -> tuple[Place, list[Arrival], list[Arrival], Limits]:
    """Where, what the planner sees, what comes then (from time 0), and the limits."""
    hardware = load_hardware(combination.hardware, inter_node=combination.link)
    model = named_model_file(combination.model).config
    place = Place(
        model=dataclasses.replace(model, sliding_window=None),
        hardware=hardware,
        gpus=combination.nodes * hardware.gpus_per_node,
    )
    rows = read_trace(combination.trace, limit=2 * combination.requests)
    if len(rows) < 2 * combination.requests:
        raise ConfigError(f"{combination.trace} has {len(rows)} requests")
    arrivals = scaled(rows, rate=combination.rate, length=combination.length)
    seen, later = arrivals[: combination.requests], arrivals[combination.requests :]
    coming = [
        dataclasses.replace(arrival, time_s=arrival.time_s - later[0].time_s) for arrival in later
    ]
    return place, seen, coming, Limits(ttft_s=combination.ttft_s, tbt_s=combination.tbt_s)


def _response(found: plan.Plan) -> float:
    return float((found.figures["response_s"] or {}).get("mean", 0.0))


if __name__ == "__main__":
    sys.exit(main())
