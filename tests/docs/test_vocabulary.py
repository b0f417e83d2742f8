"""Retired names of docs/vocabulary.md: no module, identifier or comment bears one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "vocabulary.md"
FOLDERS = ("sps2_mega", "benchmarks", "tools", "launch", "tests")
# (file, name): why it may stand there.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def retired_names(page: str) -> list[str]:
    """Identifiers and files of the package in the first column of "Retired names"."""
    section = page.partition("\n## Retired names\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_page_names_what_is_retired():
    rows = "| retired | today |\n|---|---|\n| `Old`, `a/b.py` | `New` |\n"
    page = f"# Words\n\n| `Kept` | x |\n\n## Retired names\n\n{rows}\n## More\n| `z` | y |\n"
    assert retired_names(page) == ["Old", "a/b.py"]
    assert len(retired_names(PAGE.read_text())) > 20


def test_retired_names_do_not_return():
    names = retired_names(PAGE.read_text())
    files = [name for name in names if name.endswith(".py")]
    assert not [name for name in files if (ROOT / "sps2_mega" / name).exists()]
    words = re.compile(rf"\b({'|'.join(name for name in names if name not in files)})\b")
    found = []
    for path in python_files():
        name = str(path.relative_to(ROOT))
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for word in words.findall(line):
                if (name, word) not in EXCEPTIONS:
                    found.append(f"{name}:{number}: {word}")
        found += [f"{name}: the module" for word in words.findall(path.stem)]
    assert not found
