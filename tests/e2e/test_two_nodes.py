"""Two ranks on two nodes, each under its own launcher: the same text as one rank, and one end for
both."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from generation_job import (
    generate_command,
    num_answers,
    texts_of,
    whole_lines,
    write_requests,
)
from launched import LaunchedJob, launched, node_command
from netns import two_nodes

pytestmark = pytest.mark.netns
LIMIT_S = 15.0
NUM_REQUESTS, MAX_TOKENS = 10, 50


@contextlib.contextmanager
def two_node_job(
    folder: Path, launcher: str, program: Sequence[str]
) -> Iterator[tuple[LaunchedJob, LaunchedJob]]:
    with two_nodes() as nodes, contextlib.ExitStack() as stack:
        jobs = []
        for rank, node in enumerate(nodes):
            command = [*node_command(launcher, rank, nodes, folder), *program]
            log = folder / f"log-{rank}-{time.monotonic_ns()}"
            context = launched(command, log, prefix=node.prefix, **node.environment)
            jobs.append(stack.enter_context(context))
        yield jobs[0], jobs[1]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_killed_rank_ends_both_nodes_and_resume_gives_the_text_of_one_rank(tmp_path, launcher):
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = write_requests(requests, NUM_REQUESTS, MAX_TOKENS)
    program = generate_command(requests, answers, sp=2)

    with two_node_job(tmp_path, launcher, program) as jobs:
        jobs[0].wait_until(lambda: num_answers(answers) >= 2, 120)
        finished = whole_lines(answers)
        jobs[0].signalled_at = time.monotonic()
        jobs[1].send(jobs[1].ranks()[1], signal.SIGKILL)
        assert [job.wait_end(LIMIT_S) != 0 for job in jobs] == [True, True]
        [message] = jobs[0].messages()
    assert "rank 1 (node " in message and "died in step " in message
    assert whole_lines(answers)[: len(finished)] == finished
    assert len(whole_lines(answers)) < NUM_REQUESTS, "killed too late to prove anything"

    with two_node_job(tmp_path, launcher, [*program, "--resume"]) as jobs:
        assert [job.main.wait(120) for job in jobs] == [0, 0], [job.output() for job in jobs]
    assert sorted(texts_of(answers)) == sorted(ids)

    alone = generate_command(requests, tmp_path / "alone.jsonl", sp=1)
    with launched([sys.executable, *alone], tmp_path / "log-alone") as job:
        assert job.main.wait(120) == 0, job.output()
    assert texts_of(answers) == texts_of(tmp_path / "alone.jsonl")
