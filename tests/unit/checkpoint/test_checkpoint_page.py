"""The table of docs/checkpoints.md has every format, shape and release that it is made for."""

from __future__ import annotations

import pytest
from checkpoint_table import cells, page


def test_the_table_has_every_cell_and_none_fails():
    names, *rows = page.shown(page.PAGE.read_text())
    assert names == ["written as", "TP x PP", *cells.RELEASES]
    wanted = [(kind.title, str(shape)) for _, kind, shape, _ in cells.places()]
    wanted += [(f"`torch_dist`, {name}", str(cells.ONE)) for name in cells.SETTINGS]
    assert [(row[0], row[1]) for row in rows] == wanted
    refused = {kind.title for kind in cells.FORMATS.values() if kind.refused}
    for title, _, *results in rows:
        for result in results:
            if title in refused:
                assert result == "refused"
            else:
                assert 0 < float(result) < cells.TOLERANCE


def test_another_table_replaces_the_one_between_the_marks():
    text = page.PAGE.read_text()
    lines = ["| written as | x |", "| --- | --- |", "| `legacy`, old | 1e-06 |", "", "| read |"]
    changed = page.with_table(text, lines)
    assert page.shown(changed) == [["written as", "x"], ["`legacy`, old", "1e-06"]]
    assert changed.split("<!-- table")[0] == text.split("<!-- table")[0]
    with pytest.raises(ValueError, match="no markers"):
        page.with_table("no page", lines)
