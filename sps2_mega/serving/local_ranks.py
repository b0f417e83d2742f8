"""Ranks of a job on this machine, as children of a Python program without a launcher.

This process is rank 0 of a command, where its end is the job's end. For `LLM` all ranks are
children, so that a failure reaches the program as an exception only. The children read their
configuration from a pipe and end when it closes, so that none outlives the parent, however the
parent ends. They are terminated by process id only.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import IO

from sps2_mega.comm.watchdog import active_watchdogs
from sps2_mega.config import EngineConfig
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.parallel.rank_pools import split_rank_pools

log = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_TAIL_LINES = 30
_LEAVE_SECONDS = 10.0
# A child that dies before the ranks have met leaves this process waiting in
# native code, which no exception reaches.
_GRACE_SECONDS = 5.0
DEATH_EXIT_CODE = 1
# Of a child whose error all ranks raise, so that rank 0 alone reports it.
REFUSED_EXIT_CODE = 2


class LocalRanks:
    """Ranks as children; until `close`, the end of one of them is a failure."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        grace_s: float = 0.0,
        driver: Connection | None = None,
    ) -> None:
        """Start the children: ranks 1 to world_size - 1, or all, where rank 0 is driven through
        `driver`, its end of a pipe.

        After a signal a child waits `grace_s` seconds for this process to end the job. When one is
        lost, this process ends; with `driver`, the other children end, and `lost` tells.

        Raises:
            ConfigError: the degrees contradict each other.
        """
        world_size = config.parallel.world_size
        split_rank_pools(config.parallel, world_size)
        log.info("no launcher: starting all %d ranks on this machine", world_size)
        self.info = _launch_info(0, world_size, _free_port())
        self._closing = threading.Event()
        self._inside = driver is None
        self.lost: str | None = None
        self._children = [
            _Child(
                _launch_info(rank, world_size, self.info.master_port),
                config,
                grace_s,
                driver if rank == 0 else None,
            )
            for rank in range(1 if self._inside else 0, world_size)
        ]
        self._watcher = threading.Thread(target=self._watch, name="sps2-local-ranks", daemon=True)
        self._watcher.start()

    @property
    def pids(self) -> list[int]:
        return [child.process.pid for child in self._children]

    def await_loss(self) -> str | None:
        """How the first child that was lost ended, once the others have ended too."""
        self._watcher.join(2 * _GRACE_SECONDS)
        return self.lost

    def close(self, *, told: bool = True) -> None:
        """End the ranks; with `told`, they know of the shutdown and get time to leave."""
        self._closing.set()
        deadline = time.monotonic() + (_LEAVE_SECONDS if told else 0.0)
        for child in self._children:
            child.end(deadline)
        self._watcher.join()

    def _watch(self) -> None:
        while not self._closing.wait(0.2):
            dead = next((c for c in self._children if c.process.poll() is not None), None)
            if dead is None:
                continue
            if not self._inside:
                self._end_others(dead)
                return
            # All ranks refuse alike: this one is about to say so.
            if dead.process.returncode == REFUSED_EXIT_CODE and self._closing.wait(_GRACE_SECONDS):
                return
            # The watchdog, once there is one, reports the reason and ends this process first.
            if not active_watchdogs():
                sys.stderr.write(dead.report())
                sys.stderr.flush()
            if not self._closing.wait(_GRACE_SECONDS):
                for child in self._children:
                    child.process.kill()
                os._exit(DEATH_EXIT_CODE)
            return

    def _end_others(self, dead: _Child) -> None:
        """Remember how `dead` ended, and let the others tell their reason before they are ended."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while not self._closing.wait(0.05) and time.monotonic() < deadline:
            if all(child.process.poll() is not None for child in self._children):
                break
        if self._closing.is_set():
            return
        self.lost = dead.report().rstrip().removeprefix("sps2_mega: ")
        for child in self._children:
            child.process.kill()


class _Child:
    """One rank: its process, the pipe that keeps it alive, and the last lines of its stderr."""

    def __init__(
        self, info: LaunchInfo, config: EngineConfig, grace_s: float, driver: Connection | None
    ) -> None:
        self.info = info
        variables = {
            "RANK": info.rank,
            "WORLD_SIZE": info.world_size,
            "LOCAL_RANK": info.local_rank,
            "LOCAL_WORLD_SIZE": info.local_world_size,
            "MASTER_ADDR": info.master_addr,
            "MASTER_PORT": info.master_port,
            # The child must find the same packages, wherever this program found them.
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        }
        self.process = subprocess.Popen(
            # env(1) adds to the inherited environment and then becomes the child itself.
            [
                "env",
                *(f"{name}={value}" for name, value in variables.items()),
                sys.executable,
                "-m",
                "sps2_mega.serving.rank",
                f"{grace_s:g}",
                *([] if driver is None else [str(driver.fileno())]),
            ],
            pass_fds=() if driver is None else (driver.fileno(),),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None and self.process.stderr is not None
        self._tail: collections.deque[bytes] = collections.deque(maxlen=_TAIL_LINES)
        self._reader = threading.Thread(
            target=self._forward, args=(self.process.stderr,), name="sps2-rank-stderr", daemon=True
        )
        self._reader.start()
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(config)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it is dead already; the watcher reports it

    def report(self) -> str:
        self._reader.join(1.0)
        tail = b"".join(self._tail).decode(errors="replace").rstrip()
        return (
            f"sps2_mega: rank {self.info.rank} (pid {self.process.pid}) ended with code "
            f"{self.process.returncode}; its last lines:\n{tail or '(none)'}\n"
        )

    def end(self, deadline: float) -> None:
        """Wait until `deadline` (of time.monotonic()), then terminate, then kill."""
        for stop in (lambda: None, self.process.terminate):
            stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.5, deadline - time.monotonic()))
                break
        else:
            self.process.kill()
            self.process.wait()  # the kernel takes its time to free the memory of a large process
        assert self.process.stdin is not None and self.process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._reader.join(1.0)
        if not self._reader.is_alive():
            self.process.stderr.close()

    def _forward(self, stderr: IO[bytes]) -> None:
        for line in stderr:
            self._tail.append(line)
            sys.stderr.write(line.decode(errors="replace"))


def _launch_info(rank: int, world_size: int, port: int) -> LaunchInfo:
    return LaunchInfo(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        node_rank=0,
        master_addr=_LOOPBACK,
        master_port=port,
        launcher="env",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])
