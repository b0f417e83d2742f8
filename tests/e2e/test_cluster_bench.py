"""The emulated cluster bench at a tiny size: measures, compares answers, leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import parent_of

pytestmark = [pytest.mark.netns, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [
    *(sys.executable, str(ROOT / "benchmarks" / "cluster.py")),
    *("--shapes", "sps2-tiny", "--chunks", "100", "--repeats", "1"),
    *("--decode", "3", "--rates", "1gbit,3mbit"),
]


def namespaces_of(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if line.startswith(f"sps2-bench-{pid}-")]


def started(*systems: str, tokens: int = 201) -> subprocess.Popen:
    command = [*COMMAND, "--tokens", str(tokens), "--systems", ",".join(systems)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_two_nodes_give_the_answers_of_one_rank_and_a_slow_link_costs_time():
    systems = ("alone", "tp-chunked-100", "ulysses", "ulysses-pipelined")
    bench = started(*systems)
    out, err = bench.communicate(timeout=300)
    assert bench.returncode == 0, err
    [run] = json.loads(out)["runs"]
    curves = run["curves"]
    assert set(curves) == set(systems)
    for name in ("tp-chunked-100", "ulysses"):
        fast, slow = curves[name]["1gbit"]["ttft_s"], curves[name]["3mbit"]["ttft_s"]
        assert slow > 2 * fast, (name, fast, slow)
    assert all(point["tbt_s"] > 0 for curve in curves.values() for point in curve.values())
    assert max(run["max_logprob_difference"].values()) < 1e-4
    assert namespaces_of(bench.pid) == []


def test_an_interrupted_run_removes_its_nodes_and_ranks():
    bench = started("alone", "ulysses", tokens=3001)  # long enough to be interrupted
    try:
        wait_until(lambda: len(ranks_of(bench.pid)) >= 3, bench)  # one alone and a pair
        ranks = ranks_of(bench.pid)
        os.kill(bench.pid, signal.SIGINT)
        bench.communicate(timeout=60)
    finally:
        bench.kill()
    assert bench.returncode != 0
    assert namespaces_of(bench.pid) == []
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "ranks outlive the bench"
        time.sleep(0.05)


def ranks_of(pid: int) -> list[int]:
    """Children that run a rank."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has just ended
            if parent_of(int(folder.name)) == pid and "emulated/rank.py" in str(
                (folder / "cmdline").read_bytes()
            ):
                found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], bench: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert bench.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
