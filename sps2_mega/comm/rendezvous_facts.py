"""Small facts of every rank, exchanged through the job's key-value store.

No collective is involved, so ranks of different groups can take part, each when it is ready.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

# Loading may take long on one node; ranks that die meanwhile are left to the watchdog.
_PATIENCE = timedelta(days=1)


def tell_rank_zero(
    store: dist.Store, name: str, text: str, *, rank: int, world_size: int
) -> list[str]:
    """Gather every rank's `text` on rank 0, which waits for all; return an empty list elsewhere."""
    keys = [f"sps2/{name}/{number}" for number in range(world_size)]
    store.set(keys[rank], text)
    if rank > 0:
        return []
    store.wait(keys, _PATIENCE)
    return [store.get(key).decode() for key in keys]


def tell_everyone(
    store: dist.Store, name: str, text: str, *, rank: int, world_size: int
) -> list[str]:
    """Every rank's `text`, on every rank; all wait for the last one."""
    keys = [f"sps2/{name}/{number}" for number in range(world_size)]
    store.set(keys[rank], text)
    store.wait(keys, _PATIENCE)
    return [store.get(key).decode() for key in keys]
