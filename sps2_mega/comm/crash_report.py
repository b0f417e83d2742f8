"""Last message and exit of a failing process: one message per node, then `os._exit`.

Nothing here may wait for a lock that the main thread could hold (it may be inside a collective or a
blocked write), so messages bypass `sys.stderr` and the process ends by `os._exit`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from sps2_mega.comm.process_facts import start_ticks
from sps2_mega.comm.root_cause import Member

FLUSH_S = 0.3
# Ranks of a node learn of a root cause within milliseconds of each other;
# the speaker's claim must outlast that.
CLAIM_HELD_S = 0.6
# For all listeners together; they run while the claim is held anyway.
LISTENERS_S = 0.8
_listeners: list[Callable[[str], None]] = []


def on_end(listener: Callable[[str], None]) -> None:
    """Register a callback for the reason of this process's end, as for a server to tell clients.

    It runs in a thread for at most `LISTENERS_S` seconds and must not wait for the main thread.
    """
    _listeners.append(listener)


def tell_listeners(reason: str) -> None:
    def tell() -> None:
        for listener in _listeners:
            listener(reason)

    if _listeners:
        teller = threading.Thread(target=tell, name="sps2-listeners", daemon=True)
        teller.start()
        teller.join(LISTENERS_S)


def write_error(text: str) -> None:
    """Write to standard error in one call, so that lines of several ranks do not mix."""
    lead = "\n" if os.isatty(2) else ""  # a progress bar may have left the cursor inside a line
    data = f"{lead}{text.rstrip()}\n".encode(errors="replace")
    try:
        while data:
            data = data[os.write(2, data) :]
    except OSError:
        return  # nobody is listening any more


class SpeakerClaim:
    """Claim of a name by at most one process per node; it is released when the process ends."""

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(f"\0sps2_mega-{name}")  # abstract: no file, and the bind is atomic
            self.held = True
        except OSError:
            self.held = False


def write_main_stack(member: Member) -> None:
    """Write the main thread's stack, for a step that does not end."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is not None:
        stack = "".join(traceback.format_stack(frame))
        write_error(f"{member} is here (most recent call last):\n{stack}")


def kill_hung(member: Member) -> None:
    """Send SIGKILL to a process if it is still the one that joined the job."""
    if start_ticks(member.pid) == member.start_ticks:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def leave(exit_code: int) -> NoReturn:
    """End this process now, without destructors and exit handlers; buffers get a moment to flush.

    The flush may take `FLUSH_S` seconds.
    """
    flusher = threading.Thread(target=_flush, daemon=True)
    flusher.start()
    flusher.join(FLUSH_S)
    os._exit(exit_code)


def hold_claim_then_leave(since: float, exit_code: int) -> NoReturn:
    """`leave`, but not before `CLAIM_HELD_S` seconds after `since` (of `time.monotonic()`)."""
    time.sleep(max(0.0, since + CLAIM_HELD_S - time.monotonic()))
    leave(exit_code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # closed, or replaced by something that cannot flush
