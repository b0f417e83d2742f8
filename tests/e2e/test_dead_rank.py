"""A rank that dies in mid-generation costs nothing but time: the job ends fast, also on two nodes,
and --resume completes it to the text of one rank."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from generation_job import (
    generate_command,
    num_answers,
    texts_of,
    whole_lines,
    write_requests,
)
from launched import LaunchedJob, launch_command, launched, node_command
from netns import two_nodes

LIMIT_S = 15.0
NUM_REQUESTS, MAX_TOKENS = 14, 60


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    write_requests(path, NUM_REQUESTS, MAX_TOKENS)
    return path


@pytest.fixture(scope="module")
def one_rank(requests: Path) -> Mapping[str, str]:
    """Text by id."""
    answers = requests.with_name("out.jsonl")
    command = [sys.executable, *generate_command(requests, answers, sp=1)]
    with launched(command, requests.with_name("log")) as job:
        assert job.main.wait(120) == 0, job.output()
    return texts_of(answers)


def die_in(job: LaunchedJob, victim: int, answers: Path) -> str:
    """The message of a job whose rank is killed after some more answers, and which then ends."""
    known = num_answers(answers)
    job.wait_until(lambda: num_answers(answers) >= known + 3, 120)
    finished = whole_lines(answers)
    job.send(job.ranks()[victim], signal.SIGKILL)
    assert job.wait_end(LIMIT_S) != 0
    assert whole_lines(answers)[: len(finished)] == finished
    assert len(whole_lines(answers)) < NUM_REQUESTS, "killed too late to prove anything"
    [message] = job.messages()
    return message


@contextlib.contextmanager
def two_node_job(
    folder: Path, launcher: str, program: Sequence[str]
) -> Iterator[tuple[LaunchedJob, LaunchedJob]]:
    """One rank on each of two nodes, under a launcher of its own."""
    with two_nodes() as nodes, contextlib.ExitStack() as stack:
        jobs = []
        for rank, node in enumerate(nodes):
            command = [*node_command(launcher, rank, nodes, folder), *program]
            log = folder / f"log-{rank}-{launcher}"
            context = launched(command, log, prefix=node.prefix, **node.environment)
            jobs.append(stack.enter_context(context))
        yield jobs[0], jobs[1]


@pytest.mark.netns
def test_a_job_that_dies_on_two_nodes_and_on_one_is_resumed_by_two(tmp_path, requests, one_rank):
    """Killed under torchrun, then under deepspeed; `test_launchers` kills on two nodes under
    both."""
    answers = tmp_path / "out.jsonl"
    program = generate_command(requests, answers, sp=2)
    with two_node_job(tmp_path, "torchrun", program) as jobs:
        jobs[0].wait_until(lambda: num_answers(answers) >= 3, 120)
        finished = whole_lines(answers)
        jobs[0].signalled_at = time.monotonic()
        jobs[1].send(jobs[1].ranks()[1], signal.SIGKILL)
        assert [job.wait_end(LIMIT_S) != 0 for job in jobs] == [True, True]
        [message] = jobs[0].messages()
    assert "rank 1 (node " in message and "died in step " in message
    assert whole_lines(answers)[: len(finished)] == finished
    assert len(whole_lines(answers)) < NUM_REQUESTS, "killed too late to prove anything"

    command = [*launch_command("deepspeed", 2), *program, "--resume"]
    with launched(command, tmp_path / "log-one-node") as job:
        message = die_in(job, 0, answers)
    assert re.search(r"rank 0 \(node .*\) died in step \d+ \((prefill|decode)\): ", message), (
        message
    )

    finished = whole_lines(answers)
    with two_node_job(tmp_path, "deepspeed", [*program, "--resume"]) as jobs:
        assert [job.main.wait(120) for job in jobs] == [0, 0], [job.output() for job in jobs]
        assert [job.messages() for job in jobs] == [[], []]
    assert whole_lines(answers)[: len(finished)] == finished
    assert texts_of(answers) == one_rank
