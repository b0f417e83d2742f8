"""Guard of a main program on every rank: the job ends with it, with a reason and no leftovers.

    with guard(from_environment()):
        main()

An uncaught exception or a non-zero exit ends all ranks, as do SIGTERM, SIGINT and the end of the
launcher, even while the main thread is inside a collective. The guard finds the process's
`Watchdog` by itself and tells the other ranks through it, with one message per node; before there
is one, only the ranks of this node agree on who speaks.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from sps2_mega.comm import crash_report
from sps2_mega.comm.parent_watch import LauncherChain
from sps2_mega.comm.process_facts import own_member
from sps2_mega.comm.root_cause import FAILURE_EXIT_CODE, cause_of, traceback_of
from sps2_mega.comm.watchdog import active_watchdogs
from sps2_mega.parallel.launcher import LaunchInfo

SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_S = 0.5  # between looks at the launcher; signals are seen at once
# Launchers forward a signal that the terminal or a cluster's agent
# has already sent to every process.
ECHO_S = 1.0
# Called with the reason to stop; returns the seconds that the program needs to end by itself.
StopHandler = Callable[[str], float]


@contextlib.contextmanager
def guard(info: LaunchInfo, *, on_stop: StopHandler | None = None) -> Iterator[None]:
    """End the whole job when the body fails; leaving it normally closes the watchdog.

    Enter it in the main thread. A signal, or the loss of the launcher, ends the job at once; with
    `on_stop`, which another thread calls, it ends the job after the seconds that `on_stop`
    returns. A second signal does not wait for them.

    After a failure the context manager does not return: the process ends by `os._exit`, since
    threads and destructors of a broken job may wait for ever. Exit codes: 1 for an exception, 128 +
    n for signal n, else the argument of `sys.exit`.
    """
    with _ending_by_signal_or_orphaned(info, on_stop or _at_once):
        try:
            yield
        except SystemExit as error:
            if error.code not in (None, 0):
                _end_for_exit(error)
        # The edge of the process: nothing is swallowed.
        except BaseException as error:  # noqa: BLE001
            _end_for_exception(info, error)
        for watchdog in active_watchdogs():
            watchdog.close()


def _end_for_exit(error: SystemExit) -> None:
    """End the job with the exit's code; without a watchdog (bad flags) exit like any program."""
    for watchdog in active_watchdogs():
        watchdog.stop(f"exit with code {error.code}", _exit_code(error))
    raise error


def _exit_code(error: SystemExit) -> int:
    return error.code if isinstance(error.code, int) else FAILURE_EXIT_CODE


def _end_for_exception(info: LaunchInfo, error: BaseException) -> NoReturn:
    for watchdog in active_watchdogs():
        watchdog.fail(error)
    stack = traceback_of(error)
    who = f"{own_member(info)} failed: {cause_of(error)}" if stack else f"{cause_of(error, None)}"
    text = f"{stack or ''}sps2_mega: {who}"
    crash_report.tell_listeners(who)
    _speak_once_per_node_and_leave(info, text, FAILURE_EXIT_CODE)


def _stop(info: LaunchInfo, cause: str, exit_code: int) -> NoReturn:
    for watchdog in active_watchdogs():
        watchdog.stop(cause, exit_code)
    text = f"sps2_mega: {own_member(info)} was told to stop: {cause}"
    crash_report.tell_listeners(text)
    _speak_once_per_node_and_leave(info, text, exit_code)


def _speak_once_per_node_and_leave(info: LaunchInfo, text: str, exit_code: int) -> NoReturn:
    """Write the message once per node: all ranks often fail for one reason, as a missing file."""
    since = time.monotonic()
    # The ranks of a node are children of one launcher process;
    # otherwise they do not know each other.
    name = f"{info.master_addr}:{info.master_port}-{os.getppid()}-{info.node_rank}"
    if info.world_size == 1:
        crash_report.write_error(text)
        crash_report.leave(exit_code)
    time.sleep(min(0.02 * info.local_rank, 0.3))
    claim = crash_report.SpeakerClaim(name)
    if claim.held:
        crash_report.write_error(text)
    crash_report.hold_claim_then_leave(since, exit_code)


@contextlib.contextmanager
def _ending_by_signal_or_orphaned(info: LaunchInfo, on_stop: StopHandler) -> Iterator[None]:
    """Handle signals in a thread, since Python's handlers run in the main thread.

    The main thread may be in a collective. The C handler writes the signal's number to a
    socket at once, and the thread reads it there.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    chain = LauncherChain(info)
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    old_handlers: dict[int, Any] = {n: signal.signal(n, _nothing) for n in SIGNALS}
    chain.ask_for_signal()
    done = threading.Event()
    arguments = (info, chain, reader, done, on_stop)
    thread = threading.Thread(target=_watch, args=arguments, name="sps2-guard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        done.set()
        writer.close()
        thread.join()
        reader.close()


def _nothing(number: int, frame: FrameType | None) -> None:
    """Handler that only replaces the signal's default action."""


def _at_once(cause: str) -> float:
    return 0.0


def _watch(
    info: LaunchInfo,
    chain: LauncherChain,
    reader: socket.socket,
    done: threading.Event,
    on_stop: StopHandler,
) -> None:
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    stop: tuple[str, int] | None = None  # cause and exit code
    stopped_at = deadline = 0.0
    while not done.is_set():
        ready = poller.poll(POLL_S * 1000)
        numbers = reader.recv(16) if ready else b""
        stops = [signal.Signals(number) for number in numbers if number in SIGNALS]
        broken = chain.broken()
        now = time.monotonic()
        if stop is None and (broken is not None or stops):
            stop = (
                (broken, FAILURE_EXIT_CODE)
                if broken is not None
                else (stops[0].name, 128 + stops[0])
            )
            stopped_at, deadline = now, now + on_stop(stop[0])
        if stop is not None and (now >= deadline or (stops and now > stopped_at + ECHO_S)):
            _stop(info, *stop)
        if ready and not numbers:
            return
