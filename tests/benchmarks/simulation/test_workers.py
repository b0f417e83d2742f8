"""Worker processes give results, and leave nothing behind when their parent is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.simulation.workers import workers

ROOT = Path(__file__).resolve().parents[3]
KILLED = """
import os, time
from benchmarks.simulation.workers import workers
with workers(1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_work_is_done_elsewhere():
    with workers(2) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()


def test_workers_end_with_a_killed_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while _is_running(worker):
        assert time.monotonic() < deadline, "the worker stays"
        time.sleep(0.05)


def _is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
