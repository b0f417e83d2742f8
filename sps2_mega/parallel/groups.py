"""Handles of the communication groups a rank belongs to; made once in `mcore.init` and passed as
arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(slots=True)
class Traffic:
    """Bytes that this rank has sent to other ranks over one group; what it keeps for itself does
    not count. A gather counts as a ring of its shard to each other rank."""

    bytes_sent: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """One communication group seen from one member. `handle` is None in a group of one rank,
    where collectives are local copies."""

    rank: int
    size: int
    handle: ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)


SINGLE = Group(rank=0, size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGroups:
    """All groups of this rank. The world is the job, or the rank's side of it where prefill and
    decode have ranks of their own (`sides`). `control` spans the world on CPU tensors (plans and
    sampled tokens); `tp`, `sp` and `sp_levels` carry model data on the compute device. `sp_back`
    has the ranks of `sp` and a communicator of its own, for results that return while inputs still
    come in; both count the same traffic."""

    global_rank: int
    world_size: int
    control: Group
    tp: Group
    sp: Group
    sp_back: Group
    sp_levels: tuple[Group, ...]
