"""Log lines of a rank: to stderr, INFO on rank 0 only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

from sps2_mega.parallel.launcher import LaunchInfo

log = logging.getLogger("sps2_mega.cli")


def log_to_stderr(info: LaunchInfo, notes: Iterable[str] = ()) -> None:
    """Set up logging for this rank; rank 0 logs the `notes` about the command line."""
    where = f" rank {info.rank}" if info.world_size > 1 else ""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if info.rank == 0 else logging.WARNING,
        format=f"%(asctime)s %(levelname)s{where} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for noisy in ("megatron", "deepspeed", "DeepSpeed", "torch", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if info.rank == 0:
        for note in notes:
            log.warning(note)
