"""A program of a few ranks with a watchdog and no torch, for tests that kill, stop and break ranks.

Usage: watchdog_rank.py FOLDER SCENARIO [RANK]. The hub's address
passes through a file in FOLDER; a rank writes `ready-R` there once it
is inside its step. The scenario is RANK's action in its third step:

    work      nothing special; all ranks end cleanly after the steps
    sleep     every rank stays in the step (until it is killed)
    raise     RANK raises, the others sleep
    overdue   RANK sleeps in the step, the others go on to the next one and sleep there
    lost      RANK raises as a transport does whose peer died, while the others sleep
    stall     RANK reports ready and sleeps; the others complain as transports do 2 s later
    quit      RANK ends with code 0, but without closing its watchdog, while the others close theirs
    early     RANK raises before there is a watchdog
    fresh     every rank has started and waits for its first step
    idle      every rank has done its steps and waits for another one
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from sps2_mega.comm.guard import guard
from sps2_mega.comm.watchdog import WAITING_AFTER_S, Watchdog
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.launcher import LaunchInfo, from_environment


def main(info: LaunchInfo, folder: Path, scenario: str, culprit: int) -> None:
    if scenario == "early":
        raise ConfigError("tp 3 does not divide 4 heads")
    watchdog = start(
        info,
        folder,
        step_timeout=1.0 if scenario == "overdue" else 60.0,
        heartbeat_timeout=8.0 if scenario == "stall" else 2.0,
    )
    is_culprit = info.rank == culprit
    watchdog.wait_for_work()
    if scenario == "fresh":
        wait_for_work(folder / f"ready-{info.rank}")
    for step in range(3):
        watchdog.step_begin(step, "decode")
        time.sleep(0.02)
        if step == 2 and scenario != "idle":
            act(scenario, is_culprit, folder / f"ready-{info.rank}")
        watchdog.step_end()
    if scenario == "overdue":
        watchdog.step_begin(3, "decode")
        time.sleep(60)
    if scenario == "idle":
        time.sleep(WAITING_AFTER_S)
        wait_for_work(folder / f"ready-{info.rank}")
    if scenario == "quit" and is_culprit:
        os._exit(0)
    if scenario == "work":
        time.sleep(0.3 * (info.rank if culprit == 0 else info.world_size - info.rank))
    watchdog.close()


def wait_for_work(ready: Path) -> None:
    time.sleep(0.5)  # until the hub knows of it
    ready.touch()
    time.sleep(60)


def act(scenario: str, is_culprit: bool, ready: Path) -> None:
    ready.touch()
    if scenario == "raise" and is_culprit:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
    if scenario == "lost" and is_culprit:
        raise RuntimeError(
            "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"
        )
    if scenario == "stall" and not is_culprit:
        time.sleep(2)
        raise RuntimeError("Timed out waiting 2000ms for recv operation to complete")
    if scenario in ("sleep", "raise", "lost", "stall") or (scenario == "overdue" and is_culprit):
        time.sleep(60)


def start(
    info: LaunchInfo, folder: Path, *, step_timeout: float, heartbeat_timeout: float
) -> Watchdog:
    address = folder / "address"

    def publish(text: str) -> None:
        address.with_suffix(".new").write_text(text)
        address.with_suffix(".new").rename(address)

    def lookup() -> str:
        while not address.exists():
            time.sleep(0.01)
        return address.read_text()

    return Watchdog.start(
        info,
        publish=publish,
        lookup=lookup,
        step_timeout=step_timeout,
        heartbeat_timeout=heartbeat_timeout,
    )


if __name__ == "__main__":
    launch_info = from_environment()
    with guard(launch_info):
        main(launch_info, Path(sys.argv[1]), sys.argv[2], int([*sys.argv, "0"][3]))
    print("clean", flush=True)
