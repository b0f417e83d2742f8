"""Run a test function on several real processes; return their results, tracebacks or stacks.

Importing torch and Megatron costs seconds per process, so ranks are forked from one process that
has imported them (`rank_imports`), and kept in pools: one pool per world size, started at first
use, shared by all tests of the session, closed at its end. Use:

    def on_each_rank(rank, x):            # a module-level function of the test module
        group = harness.default_group()   # gloo; or let the code under test initialise
        ...
        return result

    results = harness.run_ranks(on_each_rank, 4, x)      # [result of rank 0, result of rank 1, ..]

A pool survives a call in which all ranks return, or all raise the same exception. Whatever else
happens (one rank raises, hangs or dies) the pool is killed, since its collectives may be out of
step.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO, Any

import psutil
import rank_process

TESTS = Path(__file__).resolve().parent
MAX_PROCESSES = 8
GRACE_S = 5.0  # for the other ranks to answer after one failed
TAIL_CHARS = 6000
_SERVER_PORTS = range(12000, 32000)


class RankError(AssertionError):
    """A rank raised, hung or died. `rank` is the first one; the message has traceback or stacks."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, **kwargs: Any
) -> list[Any]:
    """`fn(rank, *args, **kwargs)` in every rank of the session's pool; results in rank order.

    Raises:
        RankError: a rank raised, died, or did not answer within `timeout` seconds.
    """
    return pool_of(world_size).run(fn, *args, timeout=timeout, **kwargs)


def default_group(timeout_s: float = 60) -> Any:
    """In a rank: the gloo group of all ranks, initialised at first use in a call; a rank leaves all
    groups after it.

    Ranks meet in a store that stays, under another name each time: a store of its own for each
    group would be closed by one rank while another one, already at the next group, talks to it. Its
    port is no other job's, for the same reason: tests of the launcher choose MASTER_PORT
    themselves.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        timeout = datetime.timedelta(seconds=timeout_s)
        if not _meetings:
            address, port = os.environ["MASTER_ADDR"], int(os.environ[_MEETING_PORT])
            _meetings.append(dist.TCPStore(address, port, world_size, rank == 0, timeout))
        _meetings.append(dist.PrefixStore(f"group {len(_meetings)}", _meetings[0]))
        dist.init_process_group(
            "gloo", store=_meetings[-1], rank=rank, world_size=world_size, timeout=timeout
        )
    return dist.group.WORLD


# The last one is where ranks keep what they measured of the machine; `conftest` adds one of the
# session, which goes with it.
cache_home = [Path(tempfile.gettempdir()) / "sps2-tests"]
_meetings: list[Any] = []  # in a rank: the store, then one part of it for each group
_INSIDE_RANK = "SPS2_TEST_RANK"
_MEETING_PORT = "SPS2_TEST_MEETING_PORT"

_pools: dict[int, RankPool] = {}  # least recently used first


def pool_of(world_size: int) -> RankPool:
    """The session's pool, after closing others where all together would be too many processes."""
    pool = _pools.pop(world_size, None) or RankPool(world_size)
    others = sum(p.world_size for p in _pools.values() if p.alive)
    for size in list(_pools):
        if others + world_size <= MAX_PROCESSES:
            break
        evicted = _pools.pop(size)
        others -= size if evicted.alive else 0
        evicted.close()
    _pools[world_size] = pool
    return pool


def own_processes() -> set[int]:
    """Children of this process that serve all pools: ranks are forked from one of them."""
    servers = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid
    return {pid for pid in servers if pid is not None}


def close_pools() -> None:
    while _pools:
        _pools.popitem()[1].close()


atexit.register(close_pools)


class RankPool:
    """`world_size` live processes, or none: started by the first `run` after a start or failure."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[_Rank] = []
        self._failed_first: int | None = None
        self._agreed_failure = False

    @property
    def alive(self) -> bool:
        return bool(self._ranks)

    def run(
        self, fn: Callable[..., Any], *args: Any, timeout: float = 120, seed: int = 0, **kwargs: Any
    ) -> list[Any]:
        header = _describe(fn, seed)
        payload = pickle.dumps((args, kwargs))
        if not self._ranks:
            ports = free_port(), free_port()
            self._ranks = [_Rank(r, self.world_size, ports) for r in range(self.world_size)]
        try:
            answers = self._collect(header, payload, timeout)
            failures = {r: value for r, (status, value) in answers.items() if status == "error"}
            if failures:
                self._raise_failure(answers, failures)
        except BaseException:
            if not self._agreed_failure:
                self.close()
            raise
        return [answers[r][1] for r in range(self.world_size)]

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
        self._ranks = []

    def _collect(self, header: bytes, payload: bytes, timeout: float) -> dict[int, tuple[str, Any]]:
        """Answers by rank; incomplete if one failed and others did not follow in time."""
        self._agreed_failure = False
        answers: dict[int, tuple[str, Any]] = {}
        self._failed_first = None
        for rank in self._ranks:
            if not rank.send(header, payload):
                raise RankError(rank.rank, f"rank {rank.rank} is dead\n{rank.tail()}")
        deadline = time.monotonic() + timeout
        waiting = {rank.connection: rank for rank in self._ranks}
        while waiting:
            left = deadline - time.monotonic()
            ready = wait(list(waiting), max(0.0, left))
            if not ready:
                if self._failed_first is not None:
                    return answers
                raise self._hang(timeout, list(waiting.values()))
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                answers[rank.rank] = rank.receive()
                if answers[rank.rank][0] == "error" and self._failed_first is None:
                    self._failed_first = rank.rank
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _hang(self, timeout: float, hung: list[_Rank]) -> RankError:
        for rank in self._ranks:
            rank.dump_stacks()
        time.sleep(0.5)  # the dumps are written by signal handlers
        names = ", ".join(str(rank.rank) for rank in hung)
        logs = "\n".join(f"--- rank {rank.rank}\n{rank.tail()}" for rank in self._ranks)
        return RankError(hung[0].rank, f"no answer within {timeout:g} s from rank {names}\n{logs}")

    def _raise_failure(self, answers: dict, failures: dict[int, tuple[str, str]]) -> None:
        kinds = {kind for kind, _ in failures.values()}
        self._agreed_failure = (
            len(failures) == self.world_size and len(kinds) == 1 and "died" not in kinds
        )
        assert self._failed_first is not None
        first = self._failed_first
        silent = sorted(set(range(self.world_size)) - set(answers))
        lines = [f"rank {first} of {self.world_size} failed:", failures[first][1]]
        for rank, (kind, text) in sorted(failures.items()):
            if rank != first:
                last = text.strip().splitlines()[-1] if text.strip() else kind
                lines.append(f"rank {rank} failed too: {last}")
        if silent:
            lines.append(f"no answer {GRACE_S:g} s later from ranks {silent}")
        raise RankError(first, "\n".join(lines))


@cache
def _forking() -> ForkServerContext:
    """Starts processes that have imported what ranks need already.

    An initialised CUDA driver does not survive a fork, and imports may ask for devices: beside a
    driver, ranks import for themselves.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([] if nvidia_driver() else ["rank_imports"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), before or ""])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def nvidia_driver() -> bool:
    """Whether CUDA programs can start here, found without importing torch."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


class _Rank:
    """One process of a pool and the parent's end of its pipe; an unnamed file takes its output."""

    def __init__(self, rank: int, world_size: int, ports: tuple[int, int]) -> None:
        self.rank = rank
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the rank
        self._log_start = 0
        environment = rank_environment(rank, world_size, ports[0]) | {_MEETING_PORT: str(ports[1])}
        ours, theirs = multiprocessing.Pipe()
        self.connection: Connection = ours
        with theirs:
            log = f"/proc/{os.getpid()}/fd/{self._log.fileno()}"
            self._process = _forking().Process(
                target=rank_process.main, args=(theirs, environment, log)
            )
            self._process.start()

    def send(self, header: bytes, payload: bytes) -> bool:
        self._log_start = os.fstat(self._log.fileno()).st_size
        try:
            self.connection.send_bytes(header)
            self.connection.send_bytes(payload)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._process.join(GRACE_S)
            code = self._process.exitcode
            assert code is not None
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return "error", (
                "died",
                f"rank {self.rank} died ({how}); its last output:\n{self.tail()}",
            )
        return answer

    def dump_stacks(self) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, signal.SIGUSR1)

    def tail(self) -> str:
        """Output of the process since the last call began, shortened from the front."""
        size = os.fstat(self._log.fileno()).st_size
        start = max(self._log_start, size - TAIL_CHARS)
        return os.pread(self._log.fileno(), size - start, start).decode(errors="replace")

    def kill(self) -> None:
        self.connection.close()
        # Libraries may have started processes of their own (Megatron's checkpoint writer does).
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self._process.kill()
        self._process.join()
        self._process.close()
        self._log.close()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Variables of a launcher on one node, beside the inherited ones."""
    if os.environ.get(_INSIDE_RANK):
        # Ranks import the module of the function that they run: without a guard it would start
        # ranks, and so on.
        raise RuntimeError(
            "a rank started ranks: put the script's main part behind __name__ == '__main__'"
        )
    return os.environ | {
        _INSIDE_RANK: "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(cache_home[-1]),
    }


def free_port() -> int:
    """A port for a server that a test starts in a moment. Below those that the system gives to
    outgoing connections, of which other tests open many meanwhile."""
    for port in random.SystemRandom().sample(_SERVER_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"100 ports of {_SERVER_PORTS} are in use")


def _describe(fn: Callable[..., Any], seed: int) -> bytes:
    if "<" in fn.__qualname__:
        raise TypeError(
            f"{fn.__qualname__} cannot run in ranks: it must be a module-level function"
        )
    file = sys.modules[fn.__module__].__file__
    header = {"module": fn.__module__, "file": file, "qualname": fn.__qualname__}
    return pickle.dumps(header | {"seed": seed, "sys_path": [entry for entry in sys.path if entry]})
