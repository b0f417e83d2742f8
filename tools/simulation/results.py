"""The table of all simulated comparisons in docs/results, as docs/evaluation.md has it.

python -m tools.simulation.results            (a test checks that the table is current)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.simulation.report import CLAIMS, OURS, gains, ratio_table
from tools.simulation.setting import Outcome

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "evaluation.md"
BEGIN, END = "<!-- ratios: made by tools.simulation.results -->", "<!-- end of ratios -->"


def stored() -> list[tuple[str, list[Outcome]]]:
    """(setting, outcomes) of every docs/results/simulated-*.json."""
    found = []
    for path in sorted((ROOT / "docs" / "results").glob("simulated-*.json")):
        content = json.loads(path.read_text())
        outcomes = [Outcome.from_json(entry) for entry in content["outcomes"]]
        found.append((content["setting"], outcomes))
    return found


def table() -> str:
    """Every setting, then the best and the worst gain of each claim over all of them."""
    results = stored()
    return f"{ratio_table(results)}\n\n{summary(results)}"


def summary(results: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    """Per claim: the paper's ratio, and the largest, the middle and the smallest that were simulated."""
    lines = ["| claim | paper | best | median | worst | best at |", "|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        seen = [
            (gain, f"{setting}, rate {rate:g}, {ours}")
            for setting, outcomes in results
            for rate in sorted({outcome.rate for outcome in outcomes})
            for ours in OURS
            if (gain := gains(outcomes, rate, ours)[claim.name]) is not None
        ]
        if not seen:
            continue
        seen.sort()
        lines.append(
            f"| {claim.name} | {claim.ratio:g}x | {seen[-1][0]:.2f}x | {seen[len(seen) // 2][0]:.2f}x "
            f"| {seen[0][0]:.2f}x | {seen[-1][1]} |"
        )
    return "\n".join(lines)


def document_with(text: str, new_table: str) -> str:
    """`text` with what is between the markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{DOCUMENT} needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{new_table}\n\n{END}{after}"


def main() -> int:
    DOCUMENT.write_text(document_with(DOCUMENT.read_text(), table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
