"""Validation of the simulator against the emulated cluster: measured and simulated times, errors.

    python benchmarks/validate_cluster.py [docs/results/cluster*.json ..]
        [--calibrated docs/results]

Reads what cluster.py wrote (--save) and what calibrate.py measured (calibrated-SHAPE-NODES*.yaml),
writes docs/results/validation-cluster.json and a section of docs/evaluation.md.
`emulated.simulated` holds the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.emulated.hardware import Calibrated
from benchmarks.emulated.simulated import Row, rows_of, shape_of
from benchmarks.simulation.document import EVALUATION, ROOT, with_part
from sps2_mega.errors import ConfigError

RESULTS = ROOT / "docs" / "results"
OUTPUT = RESULTS / "validation-cluster.json"
BEGIN = "<!-- cluster: made by benchmarks/validate_cluster.py -->"
END = "<!-- end of cluster -->"
GOAL_MEDIAN, GOAL_WORST = 0.10, 0.25


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="files of cluster.py")
    parser.add_argument("--calibrated", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--dry-run", action="store_true", help="only print the table")
    args = parser.parse_args(arguments)
    try:
        found = validated(args.results or cluster_results(), args.calibrated)
    except (ConfigError, OSError, KeyError, ValueError) as error:
        print(f"validate_cluster: {error}", file=sys.stderr)
        return 2
    print(section(found))
    if not args.dry_run:
        OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
        EVALUATION.write_text(written(EVALUATION.read_text(), found))
    return 0


def written(text: str, found: Mapping[str, Any]) -> str:
    """The document with its section replaced by that for `found`."""
    return with_part(text, BEGIN, END, section(found))


def cluster_results() -> list[Path]:
    """Paths of the stored result files of cluster.py."""
    return sorted(RESULTS.glob("cluster*.json"))


def validated(results: Sequence[Path], calibrated: Path) -> dict[str, Any]:
    """Content of validation-cluster.json.

    Raises:
        ConfigError: there are no results, or calibrations are missing: all of them are named.
    """
    if not results:
        raise ConfigError("no result of cluster.py: run it with --save first")
    if lacking := missing_calibrations(results, calibrated):
        raise ConfigError("calibrations are missing; they are made by\n  " + "\n  ".join(lacking))
    rows: list[Row] = []
    speeds: dict[str, float] = {}
    for path in results:
        more, speed = rows_of(json.loads(path.read_text()), calibrated)
        rows += more
        speeds |= {f"{path.stem}, {what}": round(value, 3) for what, value in speed.items()}
    return {
        "results": [path.name for path in results],
        "speed": speeds,
        "rows": [
            dataclasses.asdict(row) | {"error": round(row.error, 4), "calibrates": row.calibrates}
            for row in rows
        ],
    }


def missing_calibrations(results: Sequence[Path], folder: Path) -> list[str]:
    """Commands that write the missing files, for all shapes, node counts and rates of `results`."""
    rates: dict[tuple[str, int], dict[str, None]] = {}
    tokens: dict[tuple[str, int], int] = {}
    for path in results:
        document = json.loads(path.read_text())
        for run in document["runs"]:
            what = shape_of(run), int(document["nodes"])
            tokens[what] = max(tokens.get(what, 0), run["tokens"])
            for by_rate in run["curves"].values():
                rates.setdefault(what, {}).update(dict.fromkeys(by_rate))
    commands = []
    for (shape, nodes), found in sorted(rates.items()):
        files = Calibrated.named(shape, nodes, folder)
        if not files.complete:
            commands.append(
                f"sudo python benchmarks/calibrate.py --nodes {nodes} --rates {','.join(found)} "
                f"--model {shape} --tokens {tokens[shape, nodes]} "
                f"--output {_shown(files.together)} --one-rank {_shown(files.alone)}"
            )
    return commands


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def section(found: Mapping[str, Any]) -> str:
    """Markdown: the errors in short, then every setting."""
    rows = [Row(**{k: v for k, v in row.items() if k not in _DERIVED}) for row in found["rows"]]
    lines = [
        "| figure | model, ranks | settings | median error | worst | within 10 % | beyond 25 % | "
        "range of a measurement's own repeats, median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for figure in ("ttft", "tbt"):
        grouped: dict[str, list[Row]] = {}
        for row in rows:
            if row.figure == figure and not row.calibrates:
                grouped.setdefault(f"{row.shape}, {row.nodes}", []).append(row)
        lines += [_summary(figure, what, found) for what, found in sorted(grouped.items())]
        if len(grouped) > 1:
            lines.append(
                _summary(figure, "all", [row for each in grouped.values() for row in each])
            )
    lines += [
        "",
        "The machine's speed against its calibration, from one rank alone at each rate: "
        f"{_range(found['speed'], 'prefill')} in prefill steps, "
        f"{_range(found['speed'], 'decode')} in decode steps.",
        "",
        "| model, ranks, tokens | system | link | TTFT measured | simulated | error | TBT "
        "measured | simulated | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_setting: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        what = f"{row.shape}, {row.nodes}, {row.tokens}"
        by_setting.setdefault((what, row.system, row.rate), {})[row.figure] = row
    for (what, system, rate), figures in by_setting.items():
        cells = [what, system, rate]
        for figure in ("ttft", "tbt"):
            cells += _cells(figures.get(figure))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_DERIVED = ("error", "calibrates")


def _summary(figure: str, what: str, rows: Sequence[Row]) -> str:
    errors = [abs(row.error) for row in rows]
    worst = max(rows, key=lambda row: abs(row.error))
    near = sum(error <= GOAL_MEDIAN for error in errors)
    far = sum(error > GOAL_WORST for error in errors)
    where = (
        f"{worst.shape}, {worst.nodes} ranks, {worst.tokens} tokens, {worst.system} at {worst.rate}"
    )
    return (
        f"| {figure.upper()} | {what} | {len(rows)} | {statistics.median(errors):.1%} | "
        f"{worst.error:+.1%} ({where}) "
        f"| {near} | {far} | {statistics.median(row.spread for row in rows):.0%} |"
    )


def _range(speeds: Mapping[str, float], phase: str) -> str:
    values = [value for what, value in speeds.items() if what.endswith(phase)]
    return f"{min(values):.2f} to {max(values):.2f}"


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    error = "calibrates" if row.calibrates else f"{row.error:+.1%}"
    return [_seconds(row.measured_s), _seconds(row.simulated_s), error]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    sys.exit(main())
