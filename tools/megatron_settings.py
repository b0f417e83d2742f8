"""Write the tables of docs/reference/megatron-settings.md from the table of settings.

python tools/megatron_settings.py       (a test checks that the page is current)
"""

from __future__ import annotations

import re
from pathlib import Path

from sps2_mega.checkpoint.megatron.settings.harmless_model import MODEL
from sps2_mega.checkpoint.megatron.settings.harmless_training import TRAINING
from sps2_mega.checkpoint.megatron.settings.refused import REFUSED
from sps2_mega.checkpoint.megatron.settings.run import RUN

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "megatron-settings.md"
_TABLES = re.compile(r"(<!-- (\w+): made by [^\n]*-->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def tables() -> dict[str, list[str]]:
    """Rows of each table by its mark."""
    return {
        "run": [
            "| setting | becomes |",
            "|---|---|",
            *(f"| `{name}` | {note} |" for name, note in sorted(RUN.items())),
        ],
        "refused": [
            "| setting | accepted values | why others are refused |",
            "|---|---|---|",
            *(
                f"| `{name}` | {', '.join(f'`{value!r}`' for value in off)} | {why} |"
                for name, (off, why) in sorted(REFUSED.items())
            ),
        ],
        "harmless": [
            "| names | subject |",
            "|---|---|",
            *(
                f"| {len(names.split())} | {subject} |"
                for subject, names in (MODEL | TRAINING).items()
            ),
        ],
    }


def current(page: str) -> str:
    """The page's text with its tables made anew."""
    made = {name: "\n".join(rows) for name, rows in tables().items()}
    return _TABLES.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", page)


def main() -> None:
    PAGE.write_text(current(PAGE.read_text()))


if __name__ == "__main__":
    main()
