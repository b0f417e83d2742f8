"""Communication groups of a rank, made once in `mcore.init` and passed as arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(slots=True)
class Traffic:
    """Bytes that this rank has sent to other ranks over one group, without what it keeps.

    A gather counts as a ring: its shard once per other rank.
    """

    bytes_sent: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """One communication group seen from one member.

    `handle` is None in a group of one rank, where collectives are local copies.
    """

    rank: int
    size: int
    handle: ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)


SINGLE = Group(rank=0, size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGroups:
    """All groups of this rank.

    The world is the job, or the rank's pool where prefill and decode have separate
    ranks (`rank_pools`). `control` spans the world on CPU tensors (plans and sampled
    tokens); `tp`, `sp` and `sp_levels` carry model data on the compute device.
    `sp_back` has the ranks of `sp` and its own communicator, for results that return
    while inputs still arrive; both count into the same traffic.
    """

    global_rank: int
    world_size: int
    control: Group
    tp: Group
    sp: Group
    sp_back: Group
    sp_levels: tuple[Group, ...]
