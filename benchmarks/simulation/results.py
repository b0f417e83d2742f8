"""Tables and pictures of all simulated comparisons in docs/results.

    docs/evaluation.md            the paper's claims beside our ratios, and their spread over all
                                  settings
    docs/results/simulated.md     every setting

python -m benchmarks.simulation.results            (a test checks that all of them are current)
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.simulation import claims
from benchmarks.simulation.document import EVALUATION, ROOT, with_part
from sps2_mega.simulator.comparison.report import BASELINES, CLAIMS, OURS, gains, ratio_table
from sps2_mega.simulator.comparison.setting import Outcome

DOCUMENT = EVALUATION
EVERY = ROOT / "docs" / "results" / "simulated.md"
BEGIN, END = "<!-- ratios: made by benchmarks.simulation.results -->", "<!-- end of ratios -->"


def paths() -> list[Path]:
    return sorted((ROOT / "docs" / "results").glob("simulated-*.json"))


def path_of(name: str) -> Path:
    return ROOT / "docs" / "results" / f"simulated-{name}.json"


def stored() -> list[tuple[str, list[Outcome]]]:
    """Read (setting, outcomes) of every docs/results/simulated-*.json."""
    found = []
    for path in paths():
        content = json.loads(path.read_text())
        outcomes = [Outcome.from_json(entry) for entry in content["outcomes"]]
        found.append((content["setting"], outcomes))
    return found


def every_setting() -> str:
    """The document with a row for each setting, rate, system and baseline."""
    return (
        "# Simulated comparisons, every setting\n\n"
        "Made by `python -m benchmarks.simulation.results`; do not edit. What the columns mean, "
        "and what to make of them, says "
        f"[evaluation.md](../evaluation.md).\n\n{ratio_table(stored())}\n"
    )


def summary(results: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    """Markdown table of the paper's ratio and our best, median and worst, by claim and baseline."""
    lines = [
        "| claim | paper | over | best | median | worst | best at |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim, base in itertools.product(CLAIMS, BASELINES):
        seen = [
            (gain, f"{setting}, rate {rate:g}, {ours}")
            for setting, outcomes in results
            for rate in sorted({outcome.rate for outcome in outcomes})
            for ours in OURS
            if (gain := gains(outcomes, rate, ours, base)[claim.name]) is not None
        ]
        if not seen:
            continue
        seen.sort()
        lines.append(
            f"| {claim.name} | {claim.ratio:g}x | {base} | {seen[-1][0]:.2f}x "
            f"| {statistics.median(gain for gain, _ in seen):.2f}x | {seen[0][0]:.2f}x | "
            f"{seen[-1][1]} |"
        )
    return "\n".join(lines)


def written(text: str) -> str:
    """docs/evaluation.md with its two tables of all stored comparisons."""
    found = stored()
    text = with_part(text, claims.BEGIN, claims.END, claims.table(found, EVERY.parent))
    return with_part(text, BEGIN, END, summary(found))


def main() -> int:
    from sps2_mega.simulator.comparison.pictures import draw

    DOCUMENT.write_text(written(DOCUMENT.read_text()))
    EVERY.write_text(every_setting())
    for path, (setting, outcomes) in zip(paths(), stored(), strict=True):
        draw(setting, outcomes, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
