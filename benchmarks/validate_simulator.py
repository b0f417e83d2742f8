"""Compare the simulator with published measurements, in a table of docs/evaluation.md and as JSON.

    python benchmarks/validate_simulator.py            (a test checks that the table is current)

The published figures are in `benchmarks.simulation.published`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.simulation.document import EVALUATION, ROOT, with_part
from benchmarks.simulation.fitting import fitted
from benchmarks.simulation.published import Comparison, compare
from sps2_mega.simulator.hardware import load_hardware

DOCUMENT = EVALUATION
RESULTS = ROOT / "docs" / "results" / "validation.json"
BEGIN, END = (
    "<!-- validation: made by benchmarks/validate_simulator.py -->",
    "<!-- end of validation -->",
)


def table() -> str:
    """Markdown table of all published figures and of the fitted constants."""
    hardware = load_hardware("h100-meta")
    efficiency, latency_s = fitted(hardware)
    lines = [
        "| what | published | simulated | error | |",
        "|---|---|---|---|---|",
    ]
    for found in compare(hardware):
        row = found.published
        note = f"fits `{row.fitted_to}`" if row.fitted_to else row.known_gap
        lines.append(
            f"| {row.kind}, {row.label} | {_seconds(row.seconds)} | {_seconds(found.seconds)} "
            f"| {found.error:+.1%} | {note} |"
        )
    lines += [
        "",
        f"Fitted anew from these rows: `gemm_efficiency` {efficiency:.3f} (the file has "
        f"{hardware.gemm_efficiency:g}), "
        f"`latency_s` of the link {latency_s * 1e6:.0f} us (the file has "
        f"{hardware.inter_node.latency_s * 1e6:g} us).",
    ]
    return "\n".join(lines)


def document_with(text: str, new_table: str) -> str:
    """Replace what is between the markers in `text`."""
    return with_part(text, BEGIN, END, new_table)


def as_json(found: Comparison) -> dict[str, object]:
    row = found.published
    return {
        "kind": row.kind,
        "label": row.label,
        "published_s": row.seconds,
        "simulated_s": round(found.seconds, 6),
        "error": round(found.error, 4),
        "fitted_to": row.fitted_to or None,
        "known_gap": row.known_gap or None,
        "terms_s": {name: round(seconds, 6) for name, seconds in found.terms.items()},
    }


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def main() -> int:
    new = table()
    DOCUMENT.write_text(document_with(DOCUMENT.read_text(), new))
    rows = [as_json(found) for found in compare(load_hardware("h100-meta"))]
    RESULTS.write_text(json.dumps({"source": "arXiv 2411.01783v3", "rows": rows}, indent=1) + "\n")
    print(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
