"""Jobs under the real launchers: their command lines, their processes, and leftovers.

Every process of a job inherits a mark in its environment, so that orphans are found as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import harness
import pytest
from netns import Node

ROOT = Path(__file__).resolve().parents[1]
MARK = "SPS2_TEST_JOB"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DEEPSPEED = [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]


def launch_command(launcher: str, num_ranks: int) -> list[str]:
    """The launcher's part of a one-node command line; the program follows."""
    port = str(harness.free_port())
    if launcher == "torchrun":
        return [*TORCHRUN, "--nproc-per-node", str(num_ranks), "--master-port", port]
    require_deepspeed()
    return [*DEEPSPEED, "--num_gpus", str(num_ranks), "--master_port", port]


def node_command(launcher: str, node_rank: int, nodes: Sequence[Node], folder: Path) -> list[str]:
    """`launch_command` for one rank on each of several nodes, each started by hand."""
    port, master = "29655", nodes[0].address  # namespaces have their own ports
    if launcher == "torchrun":
        place = [
            "--nnodes",
            str(len(nodes)),
            "--node-rank",
            str(node_rank),
            "--nproc-per-node",
            "1",
        ]
        return [*TORCHRUN, *place, "--master-addr", master, "--master-port", port]
    require_deepspeed()
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
    place = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node_rank)]
    return [*DEEPSPEED, *place, "--master_addr", master, "--master_port", port]


def require_deepspeed() -> None:
    if not Path(DEEPSPEED[1]).exists():
        pytest.skip("the deepspeed launcher is not installed")


@dataclass
class LaunchedJob:
    """`main` is the launcher; `log` holds what the launcher and all ranks wrote."""

    mark: str
    main: subprocess.Popen
    log: Path
    signalled_at: float = field(default=0.0)

    def ranks(self) -> dict[int, int]:
        """Live processes by rank, without the launchers."""
        found = {}
        for pid in marked_pids(self.mark):
            rank = environment_of(pid).get("RANK")
            if rank is not None:
                found[int(rank)] = pid
        return found

    def send(self, pid: int, number: signal.Signals) -> None:
        self.signalled_at = time.monotonic()
        os.kill(pid, number)

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.main.poll() is None, f"ended before that:\n{self.output()}"
            assert time.monotonic() < deadline, f"not within {timeout} s:\n{self.output()}"
            time.sleep(0.02)

    def wait_end(self, within: float) -> int:
        """The launcher's exit code, once no process is left, `within` seconds after the signal."""
        deadline = self.signalled_at + within
        code = self.main.wait(max(0.1, deadline - time.monotonic()))
        while left := marked_pids(self.mark):
            if time.monotonic() > deadline:
                described = [f"{pid}: {' '.join(command_of(pid))}" for pid in left]
                pytest.fail(f"left after {within} s: {described}\n{self.output()}")
            time.sleep(0.05)
        return code

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def messages(self) -> list[str]:
        return [line for line in self.output().splitlines() if line.startswith("sps2_mega: ")]


@contextlib.contextmanager
def launched(
    command: Sequence[str], log: Path, *, prefix: Sequence[str] = (), **environment: str
) -> Iterator[LaunchedJob]:
    """Run `prefix` + `command`; kill all that is left of it at the end."""
    mark = uuid.uuid4().hex
    variables = {
        MARK: mark,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with open(log, "wb") as out:
        main = subprocess.Popen(
            [*prefix, *command],
            env=os.environ | variables | environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
    job = LaunchedJob(mark, main, log, time.monotonic())
    try:
        yield job
    finally:
        for pid in marked_pids(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        main.wait()


def marked_pids(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and environment_of(int(folder.name)).get(MARK) == mark:
            found.append(int(folder.name))
    return found


def environment_of(pid: int) -> dict[str, str]:
    """Empty for a process that is gone, a zombie, or somebody else's."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.decode(errors="replace").partition("=") for item in raw.split(b"\0"))
    return {name: value for name, _, value in pairs}


def command_of(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode(errors="replace") for part in raw.split(b"\0") if part]


def parent_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[1])
