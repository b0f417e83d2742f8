"""A server of this project as a child process: start, readiness, resources, end of all ranks."""

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
_END_S = 40.0  # the server itself drains for 25 at most
_READY = re.compile(r"^sps2_mega is ready: (\S+) at (http://\S+)/v1", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A ready server; `url` is without /v1, `model` is the name for clients."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path

    def resident_bytes(self) -> int:
        """Resident memory of all processes of the server."""
        total = 0
        for process in _tree(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def cpu_s(self) -> float:
        """CPU seconds of all processes of the server."""
        return cpu_seconds(self.process.pid)


@contextlib.contextmanager
def served(flags: Sequence[str], log: Path) -> Iterator[RunningServer]:
    """Run launch/serve.py with these flags on a free loopback port.

    On exit it must end by itself after a signal; what is left is killed.

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
    """CPU seconds of a process and its descendants, system time included."""
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
