"""Progress of a long run in a file, so that an interrupted run can continue."""

from __future__ import annotations

import json
from pathlib import Path


class Unfinished:
    """Names of finished tasks, in the file `path` until `finished` deletes it."""

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        """With `anew`, forget what an earlier run has done."""
        self._path = path
        if anew:
            path.unlink(missing_ok=True)
        self._names: list[str] = json.loads(path.read_text()) if path.is_file() else []

    @property
    def done(self) -> tuple[str, ...]:
        return tuple(self._names)

    def add(self, name: str) -> None:
        self._names.append(name)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._names, indent=1) + "\n")
        part.replace(self._path)

    def finished(self) -> None:
        self._path.unlink(missing_ok=True)
