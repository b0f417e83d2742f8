"""Compare `sps2 plan` with an exhaustive sweep, on 20 combinations that nothing was tuned on.

    python benchmarks/plan_sweep.py --save            what is not stored yet; continues a sweep
    python benchmarks/plan_sweep.py --save --again    all of them (15 minutes on one core)

`sps2 plan` sees the first part of a trace and chooses a setting. The next part, of as many
requests, is then served by its choice and by every setting
(`sps2_mega.simulator.comparison.neighbours`); regret is what the choice lacks of the best goodput
there. Each row is written once it is done. With --save they are docs/results/planner-sweep.json and
a table of docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.simulation.combinations import COMBINATIONS, Combination
from benchmarks.simulation.document import EVALUATION, ROOT, with_part
from benchmarks.simulation.workers import workers
from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival, scaled
from sps2_mega.simulator.comparison import best_settings
from sps2_mega.simulator.comparison.neighbours import everything
from sps2_mega.simulator.comparison.setting import layout_of, rounded
from sps2_mega.simulator.figures import Limits
from sps2_mega.simulator.hardware import load_hardware
from sps2_mega.simulator.line_up import Place
from sps2_mega.simulator.trace_files import read_trace

SAVED = ROOT / "docs" / "results" / "planner-sweep.json"
BEGIN, END = "<!-- planner: made by benchmarks/plan_sweep.py -->", "<!-- end of planner -->"
WITHIN = 0.10


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", help="these, by number from 1")
    parser.add_argument("--again", action="store_true", help="also what is stored")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="at the same time"
    )
    parser.add_argument("--save", action="store_true", help="write docs/results and the table")
    parser.add_argument("--output", type=Path, default=Path("out/planner-sweep.json"))
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    numbers = args.only or range(1, len(COMBINATIONS) + 1)
    if not all(1 <= number <= len(COMBINATIONS) for number in numbers) or args.jobs < 1:
        print(
            f"plan_sweep: --only takes 1 to {len(COMBINATIONS)}, --jobs at least 1", file=sys.stderr
        )
        return 2
    path = SAVED if args.save else args.output
    command = shlex.join(sys.argv[1:] if arguments is None else arguments)
    wanted = [COMBINATIONS[number - 1] for number in numbers]
    if not args.again:
        there = {row["name"] for row in stored(path)}
        wanted = [each for each in wanted if each.name not in there]
    with workers(args.jobs) as pool:
        waiting = [pool.submit(swept, each) for each in wanted]
        for done in tqdm(as_completed(waiting), total=len(waiting), disable=args.quiet):
            keep(done.result(), path, command)
    print(section(stored(path)))
    if args.save:
        write_document()
    return 0


def stored(path: Path = SAVED) -> list[dict[str, Any]]:
    """Rows of a file whose combinations are still wanted, in the order of `COMBINATIONS`."""
    if not path.is_file():
        return []
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    found = [rows.get(each.name) for each in COMBINATIONS]
    return [
        row
        for row, each in zip(found, COMBINATIONS, strict=True)
        if row is not None and row["combination"] == dataclasses.asdict(each)
    ]


def keep(row: dict[str, Any], path: Path, command: str) -> None:
    """Add a row to a file, or replace it; the file is readable at any moment."""
    rows = [each for each in stored(path) if each["name"] != row["name"]]
    content = {
        "command": f"python benchmarks/plan_sweep.py {command}".strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": [*rows, row],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def swept(combination: Combination) -> dict[str, Any]:
    """One row: the choice from the first part of the trace, and all settings on the second.

    Raises:
        ConfigError: a name is unknown, or nothing fits.
    """
    began = time.perf_counter()
    place, seen, coming, limits = _problem(combination)
    chosen = best_settings.ranked(place, seen, limits)[0].system
    grid = everything(best_settings.settings(place, exact=False), place)
    if chosen not in grid:
        grid.append(chosen)
    found = best_settings.in_order(
        [best_settings.tried(system, place, coming, limits) for system in grid]
    )
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
        "wall_s": time.perf_counter() - began,
    }
    result: dict[str, Any] = rounded(row)
    return result


def section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the stored rows."""
    good = sum(row["regret"] <= WITHIN for row in rows)
    lines = [
        "| combination | settings | chosen | best | goodput, chosen / best | lacks | response, "
        "chosen / best |",
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
    """The document with the table of stored rows."""
    return with_part(text, BEGIN, END, section(stored()))


def _problem(
    combination: Combination,
) -> tuple[Place, list[Arrival], list[Arrival], Limits]:
    """Place, requests that `sps2 plan` sees, requests after those (from time 0), and limits."""
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


def _response(found: best_settings.Plan) -> float:
    return float((found.figures["response_s"] or {}).get("mean", 0.0))


if __name__ == "__main__":
    sys.exit(main())
