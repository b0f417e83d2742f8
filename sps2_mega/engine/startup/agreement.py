"""Refusals while ranks start: found on one rank, raised on all, with every connection closed.

Ranks compare notes through the job's key-value store, before they meet in the next collective. So
nobody waits there for a rank that has given up, and a refusal is an exception and not the end of a
process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sps2_mega.comm.rendezvous_facts import tell_everyone
from sps2_mega.errors import CheckpointError, ConfigError, Refused

if TYPE_CHECKING:
    from torch.distributed import Store

    from sps2_mega.parallel.launcher import LaunchInfo

_KINDS: dict[str, type[ConfigError] | type[CheckpointError]] = {
    "ConfigError": ConfigError,
    "CheckpointError": CheckpointError,
}


@contextmanager
def agreeing(store: Store, info: LaunchInfo, stage: str) -> Iterator[None]:
    """Run the body, in which no rank waits for another; all ranks of the job call it together.

    Raises:
        Refused: the same on every rank, where the body failed for memory, for a file, or with an
            error of ours on some of them.
    """
    problem = None
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        problem = error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        problem = ConfigError(
            f"not enough memory while {stage}: lower num_gpu_blocks_override or max_model_len, "
            f"or use more ranks ({said})"
        )
    except OSError as error:
        problem = CheckpointError(f"cannot be read while {stage}: {error}")
    _compare(store, info, stage, problem)


def out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch says that memory, of host or device, does not suffice."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
    )


def _compare(
    store: Store, info: LaunchInfo, stage: str, problem: ConfigError | CheckpointError | None
) -> None:
    mine = None if problem is None else {"kind": type(problem).__name__, "text": str(problem)}
    if info.world_size == 1:
        if problem is not None:
            raise Refused(problem) from problem
        return
    told = tell_everyone(store, stage, json.dumps(mine), rank=info.rank, world_size=info.world_size)
    found = {rank: note for rank, note in enumerate(map(json.loads, told)) if note is not None}
    if not found:
        return
    first = next(iter(found.values()))
    texts = {note["text"] for note in found.values()}
    text = first["text"]
    if len(texts) > 1:
        text = "; ".join(f"rank {rank}: {note['text']}" for rank, note in found.items())
    raise Refused(_KINDS.get(first["kind"], ConfigError)(text)) from problem
