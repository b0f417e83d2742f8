"""A rank that dies in mid-generation costs nothing but time: the job ends fast, and --resume
completes it."""

from __future__ import annotations

import re
import signal
import sys

import pytest
from generation_job import (
    generate_command,
    num_answers,
    texts_of,
    whole_lines,
    write_requests,
)
from launched import launch_command, launched

LIMIT_S = 15.0
NUM_REQUESTS, MAX_TOKENS = 14, 60


@pytest.mark.parametrize(("launcher", "victim"), [("torchrun", 1), ("deepspeed", 0)])
def test_killed_rank_then_resume(tmp_path, launcher, victim):
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = write_requests(requests, NUM_REQUESTS, MAX_TOKENS)
    program = generate_command(requests, answers, sp=2)

    with launched([*launch_command(launcher, 2), *program], tmp_path / "log") as job:
        job.wait_until(lambda: num_answers(answers) >= 3, 120)
        finished = whole_lines(answers)
        job.send(job.ranks()[victim], signal.SIGKILL)
        assert job.wait_end(LIMIT_S) != 0
        [message] = job.messages()
    assert f"rank {victim} (node " in message
    assert re.search(r"died in step \d+ \((prefill|decode)\): ", message)
    assert whole_lines(answers)[: len(finished)] == finished
    assert len(whole_lines(answers)) < NUM_REQUESTS, "killed too late to prove anything"

    resume = [*launch_command(launcher, 2), *program, "--resume"]
    with launched(resume, tmp_path / "log-resume") as job:
        assert job.main.wait(120) == 0, job.output()
        assert job.messages() == []
    assert whole_lines(answers)[: len(finished)] == finished
    assert sorted(texts_of(answers)) == sorted(ids)

    alone = generate_command(requests, tmp_path / "alone.jsonl", sp=1)
    with launched([sys.executable, *alone], tmp_path / "log-alone") as job:
        assert job.main.wait(120) == 0, job.output()
    assert texts_of(answers) == texts_of(tmp_path / "alone.jsonl")
