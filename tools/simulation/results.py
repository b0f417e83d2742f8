"""The tables and pictures of all simulated comparisons in docs/results, as docs/evaluation.md has them.

python -m tools.simulation.results            (a test checks that the table is current)
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.simulation.document import EVALUATION, ROOT, with_part
from tools.simulation.report import BASELINES, CLAIMS, OURS, gains, ratio_table
from tools.simulation.setting import Outcome

DOCUMENT = EVALUATION
BEGIN, END = "<!-- ratios: made by tools.simulation.results -->", "<!-- end of ratios -->"


def paths() -> list[Path]:
    return sorted((ROOT / "docs" / "results").glob("simulated-*.json"))


def stored() -> list[tuple[str, list[Outcome]]]:
    """(setting, outcomes) of every docs/results/simulated-*.json."""
    found = []
    for path in paths():
        content = json.loads(path.read_text())
        outcomes = [Outcome.from_json(entry) for entry in content["outcomes"]]
        found.append((content["setting"], outcomes))
    return found


def table() -> str:
    """Every setting, then the best and the worst gain of each claim over all of them."""
    results = stored()
    return f"{ratio_table(results)}\n\n{summary(results)}"


def summary(results: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    """Per claim and baseline: the paper's ratio, and the largest, the middle and the smallest that were simulated."""
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
            f"| {statistics.median(gain for gain, _ in seen):.2f}x | {seen[0][0]:.2f}x | {seen[-1][1]} |"
        )
    return "\n".join(lines)


def document_with(text: str, new_table: str) -> str:
    """`text` with what is between the markers replaced."""
    return with_part(text, BEGIN, END, new_table)


def main() -> int:
    from tools.simulation.pictures import draw

    DOCUMENT.write_text(document_with(DOCUMENT.read_text(), table()))
    for path, (setting, outcomes) in zip(paths(), stored(), strict=True):
        draw(setting, outcomes, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
