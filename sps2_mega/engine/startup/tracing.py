"""Trace file of a run (`--trace FILE`), for Perfetto (ui.perfetto.dev) or chrome://tracing.

    during the run    every rank appends its events to FILE.rankN after each prefill step
    at a clean end    rank 0 collects them into FILE, and the parts are removed
    after a failure   the parts stay; each is a valid trace (the last bracket may be missing)

Events are defined in `attention.pipeline.trace`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from sps2_mega.attention.pipeline.trace import TraceRecorder
from sps2_mega.comm.clock import clock_offset
from sps2_mega.comm.collectives import gather_bytes
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.groups import Group


class TraceFile:
    """This rank's part of a trace. All ranks create and finish it together."""

    def __init__(self, path: Path, control: Group) -> None:
        self.recorder = TraceRecorder(control.rank, offset_s=clock_offset(control))
        self._path, self._control = path, control
        self._part_path = part_path(path, control.rank)
        self._part: IO[str] = self._part_path.open("w", encoding="utf-8")
        self._part.write("[\n")

    def flush(self) -> None:
        """Write what was recorded since the last call, so that it survives a failure."""
        for event in self.recorder.take_events():
            self._part.write(json.dumps(event, separators=(",", ":")) + ",\n")
        self._part.flush()

    def finish(self) -> None:
        """Collect all parts on rank 0, which writes the whole trace."""
        self.flush()
        self._part.close()
        parts = gather_bytes(self._part_path.read_bytes(), self._control)
        if parts is not None:
            lines = [line for part in parts for line in part.decode().splitlines()[1:]]
            body = "\n".join(lines).rstrip(",")
            self._path.write_text(f'{{"displayTimeUnit":"ms","traceEvents":[\n{body}\n]}}\n')
        self._part_path.unlink()


def part_path(path: Path, rank: int) -> Path:
    """File of one rank's part."""
    return path.with_name(f"{path.name}.rank{rank}")


def check_trace_path(path: Path, rank: int) -> None:
    """Check that this rank can write its part.

    Raises:
        ConfigError: it cannot.
    """
    if path.is_dir():
        raise ConfigError(f"--trace {path} is a folder; a file name is needed")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"--trace {path}: there is no folder {folder} on rank {rank}'s machine")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--trace {path}: rank {rank} may not write to folder {folder}")
