"""The table of docs/checkpoints.md, between its markers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_table import cells

if TYPE_CHECKING:
    from checkpoint_table.read import Outcome

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"
_TABLE = re.compile(r"(<!-- table: made by [^\n]*-->\n).*?(<!-- end of table -->)", re.DOTALL)


def rows(found: Mapping[tuple[str, str], Outcome], releases: Sequence[str]) -> list[str]:
    """Lines of the table: one row for each format and shape, one column for each release."""
    head = ["written as", "TP x PP", *releases]
    lines = [_row(head), _row(["---"] * len(head))]
    for _, kind, shape, folder in cells.places():
        lines.append(_row([kind.title, str(shape), *_results(found, folder, releases)]))
    for name in cells.SETTINGS:
        results = _results(found, cells.settings_folder(name), releases)
        lines.append(_row([f"`torch_dist`, {name}", str(cells.ONE), *results]))
    return [*lines, "", *_readers(found)]


def _readers(found: Mapping[tuple[str, str], Outcome]) -> list[str]:
    """The second table: what each shape of a reading job gave over all folders."""
    lines = [_row(["read at", "folders", "largest difference"]), _row(["---"] * 3)]
    for tp, sp in cells.READERS:
        read = [o.differences[tp, sp] for o in found.values() if (tp, sp) in o.differences]
        lines.append(_row([f"TP {tp}, SP {sp}", str(len(read)), f"{max(read):.1e}"]))
    return lines


def _results(
    found: Mapping[tuple[str, str], Outcome], folder: str, releases: Sequence[str]
) -> list[str]:
    return [_result(found[release, folder]) for release in releases]


def _result(outcome: Outcome) -> str:
    if outcome.failure:
        return "**fails**"
    return "refused" if outcome.refusal else f"{outcome.largest:.1e}"


def _row(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def with_table(page: str, lines: Sequence[str]) -> str:
    """The page's text with another table."""
    made, count = _TABLE.subn(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], page)
    if count != 1:
        raise ValueError(f"{PAGE} has no markers of the table")
    return made


def shown(page: str) -> list[list[str]]:
    """Cells of the first table between the marks, its head first."""
    match = _TABLE.search(page)
    if match is None:
        raise ValueError(f"{PAGE} has no markers of the table")
    head, _, *lines = [line for line in match[0].split("\n\n")[0].splitlines() if line[0] == "|"]
    return [[part.strip() for part in line.strip("|").split("|")] for line in (head, *lines)]
