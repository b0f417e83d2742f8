"""Signal handlers, processes and threads that a test left behind.

Fixtures of a wider scope and the harness keep processes and threads from test to test: a test
answers only for what began while it ran.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import harness

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
GRACE_S = 3.0  # for what has been told to end


def _handlers() -> dict[signal.Signals, object]:
    return {number: signal.getsignal(number) for number in SIGNALS}


def _children() -> set[int]:
    """Live child processes of all threads but the harness's."""
    found = set()
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found |= {int(pid) for pid in listed.read_text().split()}
    return found - harness.own_processes()


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.daemon}


@dataclass
class Before:
    """State at the begin of a test."""

    handlers: dict[signal.Signals, object] = field(default_factory=_handlers)
    children: set[int] = field(default_factory=_children)
    threads: set[threading.Thread] = field(default_factory=_threads)

    def leftovers(self) -> list[str]:
        """Descriptions of all that is there in addition; handlers are restored, processes end."""
        found = []
        for number, handler in _handlers().items():
            if handler != self.handlers[number]:
                found.append(f"a handler of {number.name}: {handler}")
                signal.signal(number, self.handlers[number])
        _wait_until(lambda: not self._new_children() and not self._new_threads())
        for pid in self._new_children():
            found.append(f"process {pid}: {_command(pid)}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found + [f"thread {thread.name}" for thread in self._new_threads()]

    def _new_children(self) -> set[int]:
        return {pid for pid in _children() - self.children if _command(pid)}

    def _new_threads(self) -> set[threading.Thread]:
        return _threads() - self.threads


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GRACE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _command(pid: int) -> str:
    """Empty for a process that has ended, whether its parent knows or not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""
