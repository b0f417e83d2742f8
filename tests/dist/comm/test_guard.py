"""A program that asks for time after a signal gets it once, and uses it as it likes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys, time
from sps2_mega.comm.guard import guard
from sps2_mega.comm.crash_report import on_end
from sps2_mega.parallel.launcher import from_environment

asked = []
def on_stop(cause):
    asked.append(cause)
    print("asked", cause, flush=True)
    return float(sys.argv[1])

on_end(lambda reason: print("told", reason, flush=True))
with guard(from_environment({}), on_stop=on_stop):
    print("running", flush=True)
    ends = None
    while ends is None or time.monotonic() < ends:
        if asked and ends is None:
            ends = time.monotonic() + float(sys.argv[2])
        time.sleep(0.02)
"""


@pytest.fixture
def start():
    started = []

    def run(grace_s: float, ends_after_s: float) -> subprocess.Popen:
        process = subprocess.Popen(
            [
                *("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", PROGRAM),
                *(f"{grace_s}", f"{ends_after_s}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "running\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_time_is_granted_and_a_clean_end_is_clean(start) -> None:
    process = start(30, 0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "asked SIGTERM\n", "")


def test_no_time_ends_at_once(start) -> None:
    process = start(0, 60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert out.startswith("asked SIGINT\ntold ")
    assert "was told to stop: SIGINT" in err


def test_granted_time_runs_out(start) -> None:
    process = start(1, 60)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began > 0.9
    assert "was told to stop: SIGTERM" in err


def test_an_echo_of_the_signal_is_no_second_one(start) -> None:
    process = start(60, 60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked SIGTERM\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
