"""Jobs of plain processes end fast, completely and with one reason, however a rank is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import harness
import pytest

PROGRAM = Path(__file__).with_name("watchdog_rank.py")
ROOT = Path(__file__).resolve().parents[3]
HEARTBEAT_TIMEOUT_S = 2.0  # of the program, except in one scenario


@dataclass(frozen=True)
class Job:
    folder: Path
    ranks: list[subprocess.Popen]

    def wait_ready(self, timeout: float = 20) -> None:
        """Wait until every rank is inside its step."""
        deadline = time.monotonic() + timeout
        while not all((self.folder / f"ready-{r}").exists() for r in range(len(self.ranks))):
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.01)

    def wait_end(self, timeout: float) -> list[int]:
        """Exit codes; fails if a rank is still alive `timeout` seconds from now."""
        deadline = time.monotonic() + timeout
        return [rank.wait(max(0.01, deadline - time.monotonic())) for rank in self.ranks]

    def errors(self) -> list[str]:
        return [(self.folder / f"stderr-{r}").read_text() for r in range(len(self.ranks))]

    def messages(self) -> list[str]:
        """All lines of the runtime itself, from all ranks."""
        lines = "".join(self.errors()).splitlines()
        return [line for line in lines if line.startswith("sps2_mega:")]


@contextlib.contextmanager
def job(
    folder: Path,
    scenario: str,
    *,
    world_size: int = 3,
    culprit: int = 0,
    per_node: int | None = None,
) -> Iterator[Job]:
    port = harness.free_port()
    per_node = per_node or world_size
    ranks = []
    for rank in range(world_size):
        place = {
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "NODE_RANK": str(rank // per_node),
            "PYTHONPATH": str(ROOT),
        }
        with (
            open(folder / f"stderr-{rank}", "wb") as stderr,
            open(folder / f"out-{rank}", "wb") as out,
        ):
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(PROGRAM), str(folder), scenario, str(culprit)],
                    env=harness.rank_environment(rank, world_size, port) | place,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=stderr,
                )
            )
    try:
        yield Job(folder, ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("first_to_close", [0, 1])
def test_clean_end_in_any_order(tmp_path, world_size, first_to_close):
    with job(tmp_path, "work", world_size=world_size, culprit=first_to_close) as running:
        assert running.wait_end(20) == [0] * world_size
        assert running.errors() == [""] * world_size
    assert all((tmp_path / f"out-{rank}").read_text() == "clean\n" for rank in range(world_size))


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_killed_rank_ends_all_with_one_message(tmp_path, victim):
    with job(tmp_path, "sleep") as running:
        running.wait_ready()
        pid = running.ranks[victim].pid
        running.ranks[victim].kill()
        codes = running.wait_end(5)
        assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
        [message] = running.messages()
    assert (
        f"rank {victim} (node {os.uname().nodename}, pid {pid}) died in step 2 (decode)" in message
    )


def test_one_message_per_node(tmp_path):
    with job(tmp_path, "sleep", world_size=4, per_node=2) as running:
        running.wait_ready()
        running.ranks[3].kill()
        running.wait_end(5)
        spoke = [bool(text) for text in running.errors()]
    assert spoke == [True, False, True, False]


@pytest.mark.parametrize("victim", [0, 2])
def test_stopped_rank_is_found_by_silence_and_killed(tmp_path, victim):
    with job(tmp_path, "sleep") as running:
        running.wait_ready()
        running.ranks[victim].send_signal(signal.SIGSTOP)
        codes = running.wait_end(HEARTBEAT_TIMEOUT_S + 5)
        [message] = running.messages()
    assert codes[victim] == -signal.SIGKILL
    assert f"rank {victim} " in message
    assert "stopped answering in step 2 (decode): no heartbeat for 2 s" in message


@pytest.mark.parametrize("victim", [0, 2])
def test_who_stands_still_is_blamed_and_killed_when_others_complain_earlier(tmp_path, victim):
    """A transport may give up before silence alone is enough (here 8 s)."""
    with job(tmp_path, "stall", culprit=victim) as running:
        running.wait_ready()
        running.ranks[victim].send_signal(signal.SIGSTOP)
        codes = running.wait_end(7)
        [message] = running.messages()
    assert codes[victim] == -signal.SIGKILL
    assert f"rank {victim} " in message
    assert "stopped answering in step 2 (decode): no heartbeat for " in message


@pytest.mark.parametrize("scenario", ["fresh", "idle"])
def test_a_rank_lost_while_there_is_nothing_to_do(tmp_path, scenario):
    with job(tmp_path, scenario) as running:
        running.wait_ready()
        running.ranks[1].kill()
        running.wait_end(5)
        [message] = running.messages()
    assert "rank 1 " in message and "died during the wait for work: " in message


def test_all_ranks_stopped_and_continued_go_on(tmp_path):
    with job(tmp_path, "sleep") as running:
        running.wait_ready()
        for action in (signal.SIGSTOP, signal.SIGCONT):
            for rank in running.ranks:
                rank.send_signal(action)
            time.sleep(HEARTBEAT_TIMEOUT_S + 1)
        assert [rank.poll() for rank in running.ranks] == [None] * 3


@pytest.mark.parametrize("culprit", [0, 2])
def test_exception_is_the_cause_with_one_traceback(tmp_path, culprit):
    with job(tmp_path, "raise", culprit=culprit) as running:
        assert running.wait_end(20) == [1, 1, 1]
        [message] = running.messages()
        tracebacks = [text.count("Traceback") for text in running.errors()]
    assert f"rank {culprit} " in message
    assert "failed in step 2 (decode): RuntimeError: CUDA out of memory. Tried" in message
    assert tracebacks == [int(rank == culprit) for rank in range(3)]


def test_effect_is_reported_only_where_no_cause_is_found(tmp_path):
    with job(tmp_path, "lost", culprit=1) as running:
        assert running.wait_end(20) == [1, 1, 1]
        [message] = running.messages()
    assert "rank 1 " in message
    assert "lost its peers in step 2 (decode): RuntimeError: [gloo" in message


def test_step_that_does_not_end_names_the_slow_and_the_waiting(tmp_path):
    with job(tmp_path, "overdue", culprit=1) as running:
        assert running.wait_end(20) == [1, 1, 1]
        [message] = running.messages()
        errors = "".join(running.errors())
    assert "sps2_mega: step 2 (decode) did not end within 1 s on rank 1 (" in message
    assert "; in step 3 (decode): rank 0 (" in message
    assert "most recent call last" in errors and "time.sleep(60)" in errors


def test_leaving_without_goodbye_is_a_death(tmp_path):
    with job(tmp_path, "quit", culprit=2) as running:
        codes = running.wait_end(20)
        assert codes[0] == 1 and codes[2] == 0
        assert any("rank 2 " in message and "died" in message for message in running.messages())


@pytest.mark.parametrize(("number", "victim"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_signal_to_one_rank_ends_all(tmp_path, number, victim):
    with job(tmp_path, "sleep") as running:
        running.wait_ready()
        running.ranks[victim].send_signal(number)
        assert running.wait_end(5) == [128 + number] * 3
        [message] = running.messages()
    assert (
        f"rank {victim} " in message
        and f"was told to stop in step 2 (decode): {number.name}" in message
    )


def test_death_is_the_cause_although_launchers_signal_everybody(tmp_path):
    with job(tmp_path, "sleep") as running:
        running.wait_ready()
        running.ranks[2].kill()
        for rank in running.ranks[:2]:
            rank.terminate()
        running.wait_end(5)
        [message] = running.messages()
    assert "rank 2 " in message and "died" in message


def test_error_of_all_ranks_before_the_watchdog_is_said_once(tmp_path):
    with job(tmp_path, "early") as running:
        assert running.wait_end(20) == [1, 1, 1]
        assert running.errors().count("sps2_mega: ConfigError: tp 3 does not divide 4 heads\n") == 1
        assert len(running.messages()) == 1
