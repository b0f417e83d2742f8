"""Under both real launchers a job ends completely, whichever of its processes is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launched import LaunchedJob, launch_command, launched, node_command, parent_of
from netns import cut_cable, two_nodes

PROGRAM = str(Path(__file__).parent / "comm" / "watchdog_rank.py")
LAUNCHERS = ["torchrun", "deepspeed"]
LIMIT_S = 15.0


def start(tmp_path: Path, launcher: str, scenario: str):
    options = ["--no_local_rank"] if launcher == "deepspeed" else []
    command = [*launch_command(launcher, 2), *options, PROGRAM, str(tmp_path), scenario]
    return launched(command, tmp_path / "log")


def wait_ready(job: LaunchedJob, folder: Path) -> None:
    job.wait_until(lambda: (folder / "ready-0").exists() and (folder / "ready-1").exists(), 60)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_clean_end(tmp_path, launcher):
    with start(tmp_path, launcher, "work") as job:
        assert job.main.wait(60) == 0
        assert job.output().splitlines().count("clean") == 2
        assert job.messages() == []


@pytest.mark.parametrize(("launcher", "victim"), [("torchrun", 1), ("deepspeed", 0)])
def test_killed_rank(tmp_path, launcher, victim):
    """`test_watchdog` kills every rank of a job; here it matters what launchers do then."""
    with start(tmp_path, launcher, "sleep") as job:
        wait_ready(job, tmp_path)
        job.send(job.ranks()[victim], signal.SIGKILL)
        assert job.wait_end(LIMIT_S) != 0
        [message] = job.messages()
    assert f"rank {victim} (node {os.uname().nodename}, pid " in message
    assert "died in step 2 (decode)" in message


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signalled_launcher_leaves_no_ranks(tmp_path, launcher, number):
    with start(tmp_path, launcher, "sleep") as job:
        wait_ready(job, tmp_path)
        job.send(job.main.pid, number)
        assert job.wait_end(LIMIT_S) != 0
        [message] = job.messages()
    assert "was told to stop in step 2 (decode)" in message


def test_killed_launch_process_of_deepspeed_leaves_no_ranks(tmp_path):
    with start(tmp_path, "deepspeed", "sleep") as job:
        wait_ready(job, tmp_path)
        launch = parent_of(job.ranks()[0])
        assert launch != job.main.pid
        job.send(launch, signal.SIGKILL)
        job.wait_end(LIMIT_S)  # the runner's exit code is 0 then, which is not ours to change
        [message] = job.messages()
    assert "is gone" in message


@contextlib.contextmanager
def two_node_job(tmp_path: Path, launcher: str, scenario: str) -> Iterator[tuple]:
    """One rank on each of two nodes, each with its own launcher process."""
    with two_nodes() as nodes, contextlib.ExitStack() as stack:
        jobs = []
        for rank, node in enumerate(nodes):
            command = node_command(launcher, rank, nodes, tmp_path)
            options = ["--no_local_rank"] if launcher == "deepspeed" else []
            program = [*options, PROGRAM, str(tmp_path), scenario]
            log = tmp_path / f"log-{rank}"
            context = launched([*command, *program], log, prefix=node.prefix, **node.environment)
            jobs.append(stack.enter_context(context))
        yield nodes, jobs


@pytest.mark.netns
@pytest.mark.parametrize(("launcher", "victim"), [("torchrun", 0), ("deepspeed", 1)])
def test_killed_rank_ends_the_other_node_too(tmp_path, launcher, victim):
    with two_node_job(tmp_path, launcher, "sleep") as (_, jobs):
        wait_ready(jobs[0], tmp_path)
        jobs[1 - victim].signalled_at = time.monotonic()
        jobs[victim].send(jobs[victim].ranks()[victim], signal.SIGKILL)
        assert [job.wait_end(LIMIT_S) != 0 for job in jobs] == [True, True]
        [message] = jobs[1 - victim].messages()
        assert jobs[victim].messages() == []  # nobody is left there to speak but the launcher
    assert f"rank {victim} (node {os.uname().nodename} [{victim}], pid " in message
    assert "died in step 2 (decode)" in message


@pytest.mark.netns
def test_cut_cable_ends_both_nodes(tmp_path):
    with two_node_job(tmp_path, "torchrun", "sleep") as (nodes, jobs):
        wait_ready(jobs[0], tmp_path)
        cut_cable(nodes[1])
        for job in jobs:
            job.signalled_at = time.monotonic()
        assert [job.wait_end(LIMIT_S) != 0 for job in jobs] == [True, True]
        messages = [job.messages() for job in jobs]
    assert len(messages[0]) == 1 and "rank 1 " in messages[0][0]
    assert len(messages[1]) == 1 and "rank 0 " in messages[1][0]
    assert all("stopped answering" in text[0] for text in messages)
