"""Places of the files that ship with the package: models, hardware, traces and prompts.

In a checkout they lie beside the package; an installed wheel has copies inside it (setup.py puts
them there). A folder of the same name in the working directory goes before both. Decides nothing
about the contents.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("model_configs", "hardware", "traces", "launch/prompts")
INSIDE = "bundled_files"  # of the installed package


def bundled_folders(name: str) -> list[Path]:
    """Candidate folders of this name, in order of precedence; some may not exist."""
    assert name in FOLDERS, f"{name!r} is not one of {FOLDERS}"
    package = Path(__file__).resolve().parent
    return [Path.cwd() / name, package.parent / name, package / INSIDE / name]


def bundled_prompts() -> Path | None:
    """JSON lines that the bundled model can answer; None where the file is missing."""
    files = [folder / "python.jsonl" for folder in bundled_folders("launch/prompts")]
    return next((file for file in files if file.is_file()), None)
