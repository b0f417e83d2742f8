"""A server of this project as a child process: started, waited for, looked at, ended with all its
ranks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0
_END_S = 40.0  # the server's own drain takes at most 25
_READY = re.compile(r"^sps2_mega is ready: (\S+) at (http://\S+)/v1", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """`url` is without /v1; `model` is what clients call it."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path

    def resident_bytes(self) -> int:
        """Resident memory of the server's processes, added up."""
        total = 0
        for process in _tree(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def cpu_s(self) -> float:
        """Seconds that the server's processes have computed."""
        return cpu_seconds(self.process.pid)


@contextlib.contextmanager
def served(flags: Sequence[str], log: Path) -> Iterator[RunningServer]:
    """launch/serve.py with these flags on a free loopback port. It must end by itself when told to;
    what is left is killed.

    Raises:
        RuntimeError: it did not get ready; the message has the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "serve.py"), "--port", "0", *flags],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        name, url = _wait_ready(process, log)
        yield RunningServer(url=url, model=name, process=process, log=log)
    finally:
        _end(process)


def cpu_seconds(pid: int) -> float:
    """Seconds that a process and its descendants have computed, the kernel's on their behalf
    included."""
    total = 0.0
    for process in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    deadline = time.monotonic() + START_S
    while True:
        ready = _READY.search(log.read_text(errors="replace"))
        if ready is not None:
            return ready[1], ready[2]
        if process.poll() is not None or time.monotonic() > deadline:
            end = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the server did not get ready within {START_S:g} s:\n{end}")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    ranks = _tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    for left in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
