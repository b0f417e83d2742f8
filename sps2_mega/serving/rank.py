"""A rank started by a Python program (`local_ranks`): configuration from stdin, then driven steps.

`python -m sps2_mega.serving.rank [SECONDS [FD]]`; not for people. After a signal the job has
SECONDS to end in good order, as its driver decides. Rank 0 takes calls from the pipe FD.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from multiprocessing.connection import Connection

from sps2_mega.comm.guard import guard
from sps2_mega.comm.watchdog import active_watchdogs
from sps2_mega.config import EngineConfig
from sps2_mega.config_mapping import engine_config_from_mapping
from sps2_mega.errors import CheckpointError, ConfigError
from sps2_mega.garbage_collection import postpone
from sps2_mega.parallel.launcher import LaunchInfo, from_environment
from sps2_mega.serving.generation import Generation
from sps2_mega.serving.local_ranks import REFUSED_EXIT_CODE
from sps2_mega.serving.remote import serve_calls


def main() -> int:
    grace_s = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    info = from_environment()
    with guard(info, on_stop=lambda _: patience(grace_s)):
        config = config_from_json(sys.stdin.buffer.readline())
        threading.Thread(target=_end_with_parent, name="sps2-parent", daemon=True).start()
        if info.rank == 0:
            return 0 if _drive(config, info, Connection(int(sys.argv[2]))) else REFUSED_EXIT_CODE
        from sps2_mega.engine.start import run_worker

        try:
            run_worker(config, info)
        except (ConfigError, CheckpointError):
            if active_watchdogs():
                raise
            return REFUSED_EXIT_CODE  # rank 0 raises the same, and reports it
    return 0


def _drive(config: EngineConfig, info: LaunchInfo, pipe: Connection) -> bool:
    def start() -> Generation:
        from sps2_mega.engine.start import start_driver

        return Generation(start_driver(config, info), config)

    return serve_calls(pipe, start)


def patience(grace_s: float) -> float:
    """Seconds to wait, after a signal, for the driver to end the job; 0 before ranks have met."""
    return grace_s if active_watchdogs() else 0.0


def config_from_json(line: bytes) -> EngineConfig:
    """The inverse of `json.dumps(dataclasses.asdict(config))`."""
    return engine_config_from_mapping(json.loads(line))


def _end_with_parent() -> None:
    """End when stdin closes: the parent holds it open while it lives, and writes nothing more."""
    while os.read(sys.stdin.fileno(), 4096):
        continue
    os._exit(1)


if __name__ == "__main__":
    postpone()
    sys.exit(main())
