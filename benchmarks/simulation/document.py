"""Generated parts of docs/evaluation.md, each between two comment lines."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVALUATION = ROOT / "docs" / "evaluation.md"


def with_part(text: str, begin: str, end: str, part: str) -> str:
    """Replace what is between the lines `begin` and `end` of `text` by `part`.

    Raises:
        SystemExit: the lines are not there.
    """
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{EVALUATION.name} needs the lines {begin} and {end}")
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"
