"""A server over the nodes of an emulated cluster: one rank in each, clients on the first node.

Decides nothing about systems or load; if a server does not get ready, the error has the end of its
log.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.emulated.jobs import rank_environment
from benchmarks.emulated.nodes import ClusterError, Node
from benchmarks.machine import ROOT

START_S = 240.0
_END_S = 40.0  # the server itself drains for 25 at most
_READY = re.compile(r"^sps2_mega is ready: (\S+) at (http://\S+)/v1", re.M)


@contextlib.contextmanager
def served_on_nodes(
    flags: Sequence[str], nodes: Sequence[Node], port: int, folder: Path
) -> Iterator[str]:
    """Run launch/serve.py with these flags on all nodes; yield its address on the first node.

    Raises:
        ClusterError: it did not get ready.
    """
    logs = [folder / f"rank{rank}.log" for rank in range(len(nodes))]
    processes = []
    try:
        for rank, (node, log) in enumerate(zip(nodes, logs, strict=True)):
            with log.open("wb") as out:
                processes.append(
                    subprocess.Popen(
                        [
                            *node.prefix,
                            *(sys.executable, str(ROOT / "launch" / "serve.py")),
                            *("--port", "0", *flags),
                        ],
                        cwd=ROOT,
                        env=os.environ
                        | rank_environment(rank, nodes, port)
                        | {"PYTHONPATH": str(ROOT)},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C is for us
                    )
                )
        yield _wait_ready(processes, logs)
    finally:
        _end(processes)


def _wait_ready(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> str:
    deadline = time.monotonic() + START_S
    while True:
        ready = _READY.search(logs[0].read_text(errors="replace"))
        if ready is not None:
            return ready[2]
        ended = [rank for rank, process in enumerate(processes) if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            text = logs[ended[0] if ended else 0].read_text(errors="replace")[-2000:]
            raise ClusterError(f"the server did not get ready within {START_S:g} s:\n{text}")
        time.sleep(0.1)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let the first rank drain and tell the others; kill what is left."""
    for process in processes[:1]:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _END_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
