"""A rank started by a Python program (`local_ranks`): configuration from stdin, then driven steps.

`python -m sps2_mega.serving.rank [SECONDS]`; not for people. After a signal the job has
SECONDS to end in good order, as its driver decides.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from sps2_mega.comm.guard import guard
from sps2_mega.comm.watchdog import active_watchdogs
from sps2_mega.config import EngineConfig
from sps2_mega.config_mapping import engine_config_from_mapping
from sps2_mega.garbage_collection import postpone
from sps2_mega.parallel.launcher import from_environment


def main() -> int:
    grace_s = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    info = from_environment()
    with guard(info, on_stop=lambda _: patience(grace_s)):
        config = config_from_json(sys.stdin.buffer.readline())
        threading.Thread(target=_end_with_parent, name="sps2-parent", daemon=True).start()
        from sps2_mega.engine.start import run_worker

        run_worker(config, info)
    return 0


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
