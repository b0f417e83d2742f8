"""Jobs on the nodes of an emulated cluster: one rank per node, kept running, one prompt at a time.

Many jobs live side by side, so that all meet the same machine, but only the job that answers runs:
the others are stopped (SIGSTOP), since the communication threads of idle ranks wake up a thousand
times a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.emulated.nodes import Node
from sps2_mega.config import EngineConfig

_ROOT = Path(__file__).resolve().parents[2]
_RANK = Path(__file__).with_name("rank.py")
_PORT = 29600
_END_S = 20.0
_SETTLE_S = 0.05  # for threads to wake up and other ranks to end their step


class JobFailed(Exception):
    """End or refusal of a job; the message has the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurements of one prompt, in seconds.

    `gaps_s` lie between its tokens. Communication is the prefill's, zero for systems that do not
    record it. `logprobs` are the likeliest first tokens, `events` the stages of rank 0 in the
    format of Chrome traces.
    """

    ttft_s: float
    gaps_s: tuple[float, ...]
    exposed_comm_s: float
    total_comm_s: float
    logprobs: dict[int, float]
    events: list[dict[str, Any]]


class Job:
    """Ranks under one configuration, from the constructor to `close`."""

    def __init__(
        self, name: str, config: EngineConfig, nodes: Sequence[Node], port: int, folder: Path
    ) -> None:
        """Start the ranks without waiting for them (`wait_ready` does); `folder` gets the logs."""
        self.name = name
        self._trace = None if config.trace is None else Path(f"{config.trace}.rank0")
        self._read = 0
        self._ready = False
        self._log = folder / f"{name}.log"
        self._processes: list[subprocess.Popen[str]] = []
        text = json.dumps(dataclasses.asdict(config))
        with self._log.open("w") as log:
            for rank, node in enumerate(nodes):
                command = [*node.prefix, sys.executable, str(_RANK), str(os.getpid()), text]
                environment = os.environ | rank_environment(rank, nodes, port)
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=_ROOT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for us; ranks end in `close`
                )
                self._processes.append(process)

    def wait_ready(self) -> None:
        """Wait until the ranks have started; no effect afterwards."""
        if not self._ready:
            self._next_answer()
            self._ready = True
            self._pause()

    def ask(self, tokens: list[int], new_tokens: int) -> Measured:
        """Measure one prompt.

        Raises:
            JobFailed: the job ended, or refused the prompt.
        """
        stdin = self._processes[0].stdin
        assert stdin is not None
        self._signal(signal.SIGCONT)
        time.sleep(_SETTLE_S)
        with contextlib.suppress(BrokenPipeError):  # the answer will be missing, and says why
            stdin.write(json.dumps({"tokens": tokens, "new_tokens": new_tokens}) + "\n")
            stdin.flush()
        answer = self._next_answer()
        self._pause()
        logprobs, gaps_s = dict(answer.pop("logprobs")), tuple(answer.pop("gaps_s"))
        return Measured(**answer, gaps_s=gaps_s, logprobs=logprobs, events=self._new_events())

    def close(self) -> None:
        """End all ranks: they leave when stdin closes, and are killed if they do not."""
        self._signal(signal.SIGCONT)
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _pause(self) -> None:
        time.sleep(_SETTLE_S)
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        """Signal all ranks that still run; each leads a process group."""
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def _next_answer(self) -> dict[str, Any]:
        stdout = self._processes[0].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise JobFailed(f"job {self.name} ended; its last lines:\n{self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise JobFailed(f"job {self.name}: {answer['error']}")
        return answer

    def _new_events(self) -> list[dict[str, Any]]:
        if self._trace is None:
            return []
        with self._trace.open() as part:
            part.seek(self._read)
            lines = part.readlines()
            self._read = part.tell()
        return [json.loads(line.rstrip(",\n")) for line in lines if line.startswith("{")]

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def rank_environment(rank: int, nodes: Sequence[Node], port: int) -> dict[str, str]:
    """A launcher's variables; a job of one rank has none."""
    common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if len(nodes) == 1:
        return common
    return (
        common
        | nodes[rank].environment
        | {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(nodes)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": nodes[0].address,
            "MASTER_PORT": str(port),
        }
    )


class Jobs:
    """Jobs by name; all that still run end with the context."""

    def __init__(self, nodes: Sequence[Node], folder: Path) -> None:
        self._nodes, self._folder = nodes, folder
        self._running: dict[str, Job] = {}
        self._started = 0

    def start(self, name: str, config: EngineConfig) -> None:
        """Start one rank per node, or a single rank on the first node."""
        size = config.parallel.tp * config.parallel.sp
        self._started += 1
        port = _PORT + self._started  # namespaces have their own ports, jobs share them
        self._running[name] = Job(name, config, self._nodes[:size], port, self._folder)

    @property
    def running(self) -> list[str]:
        return list(self._running)

    def wait_ready(self) -> None:
        for job in self._running.values():
            job.wait_ready()

    def ask(self, name: str, tokens: list[int], new_tokens: int) -> Measured:
        return self._running[name].ask(tokens, new_tokens)

    def end(self, name: str) -> None:
        self._running.pop(name).close()

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for job in self._running.values():
            if kind is not None:
                job.kill()
            else:
                job.close()
        self._running.clear()
