"""Runs of `child.py` against one checkout, and what git says about that checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.generation.child import MARK

_CHILD = Path(__file__).with_name("child.py").resolve()
_LIMIT_S = 900.0
_TAIL_LINES = 20


class ChildFailed(Exception):
    """A child ended without its answers; the message has the end of its log."""


def run_models(checkout: Path, models: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Start-up seconds of the first model, and the answers to all batches of all models in order.

    Start-up lasts from the start of the process to the warm-up's token. Every rank has one thread.

    Raises:
        ChildFailed: the child ended with an error, or without all answers.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    # -P: the child's own folder must not lead sys.path.
    done = subprocess.run(
        [sys.executable, "-P", str(_CHILD)],
        input=json.dumps({"checkout": str(checkout), "models": models}),
        capture_output=True,
        text=True,
        cwd=checkout,
        env=environment,
        timeout=_LIMIT_S,
        check=False,
    )
    said = [json.loads(s.removeprefix(MARK)) for s in done.stdout.splitlines() if s[:3] == MARK]
    answers = [line for line in said if "first_token_at" not in line]
    if done.returncode or len(answers) != sum(len(model["batches"]) for model in models):
        tail = "\n".join(done.stderr.splitlines()[-_TAIL_LINES:])
        raise ChildFailed(f"exit code {done.returncode} in {checkout}:\n{tail}")
    return said[0]["first_token_at"] - began, answers


def commit_of(checkout: Path) -> dict[str, Any]:
    """The commit that is checked out, and whether tracked files differ from it."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
