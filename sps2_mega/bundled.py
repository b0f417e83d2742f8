"""Where the files are that come with the package: model_configs/, hardware/, traces/.

In a checkout they lie beside the package; an installed wheel has copies inside it (setup.py puts
them there). A folder of the same name where the user works goes before both. Decides nothing about
what is in them.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("model_configs", "hardware", "traces")
INSIDE = "bundled_files"  # of the installed package


def bundled_folders(name: str) -> list[Path]:
    """Folders of this name that may have files, the one that counts most first; some may not be
    there."""
    assert name in FOLDERS, f"{name!r} is not one of {FOLDERS}"
    package = Path(__file__).resolve().parent
    return [Path.cwd() / name, package.parent / name, package / INSIDE / name]
