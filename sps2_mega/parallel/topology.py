"""Group topology as pure lists of ints; nothing here creates a group.

TP is the fastest axis, SP the next one; SP is cut into levels, innermost first:

    world rank = tp_rank + tp * sp_rank          sp_rank = l0 + levels[0] * (l1 + levels[1] * ..)

    tp=2 sp=4 levels=(2, 2):   node 0: ranks 0 1 | 2 3      node 1: ranks 4 5 | 6 7
    TP groups [0 1] [2 3] [4 5] [6 7]; SP groups [0 2 4 6] [1 3 5 7]
    level 0 of rank 0: [0 2], level 1: [0 4]
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from sps2_mega.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """A validated layout: `tp * sp == world_size` and `prod(sp_levels) == sp`."""

    world_size: int
    tp: int
    sp: int
    sp_levels: tuple[int, ...]

    def sp_groups(self) -> list[list[int]]:
        return [[s * self.tp + t for s in range(self.sp)] for t in range(self.tp)]

    def coordinates(self, global_rank: int) -> tuple[int, int]:
        """(tp_rank, sp_rank) of a world rank."""
        return global_rank % self.tp, global_rank // self.tp


def check_degrees(*, tp: int, sp: int, world_size: int) -> None:
    """Raise a ConfigError, with every factor, unless tp * sp == world_size."""
    if tp < 1 or sp < 1:
        raise ConfigError(f"tp and sp must be at least 1, got tp={tp} sp={sp}")
    if tp * sp != world_size:
        raise ConfigError(
            f"tp * sp must equal the number of ranks: tp={tp} * sp={sp} = {tp * sp}, "
            f"but {world_size} rank{'s were' if world_size != 1 else ' was'} started"
        )


def build_topology(
    *, tp: int, sp: int, sp_levels: Sequence[int] | None, nodes: Sequence[str]
) -> Topology:
    """Check the degrees against the real machine and choose the SP levels.

    Args:
        nodes: one node name per world rank; equal names share a machine.

    Raises:
        ConfigError: the degrees cannot be laid out; every factor is named.
    """
    world_size = len(nodes)
    check_degrees(tp=tp, sp=sp, world_size=world_size)
    ranks_per_node = _ranks_per_node(nodes)
    if (tp < ranks_per_node and ranks_per_node % tp) or (
        tp > ranks_per_node and tp % ranks_per_node
    ):
        raise ConfigError(
            f"tp={tp} and {ranks_per_node} ranks per node: one must divide the other, "
            "so that no tensor-parallel group is cut unevenly by a node border"
        )
    if sp_levels is None:
        return Topology(
            world_size=world_size, tp=tp, sp=sp, sp_levels=_natural_levels(tp, sp, ranks_per_node)
        )
    levels = tuple(sp_levels)
    if not levels or min(levels) < 1 or prod(levels) != sp:
        raise ConfigError(
            f"the product of sp_levels must equal sp: "
            f"{' * '.join(map(str, levels)) or '(none)'} = {prod(levels)}, but sp={sp}"
        )
    intra = max(1, ranks_per_node // tp)
    if len(levels) > 1 and intra > 1 and len(set(nodes)) > 1 and levels[0] != intra:
        raise ConfigError(
            f"sp_levels[0]={levels[0]} does not match the nodes: tp={tp} * "
            f"sp_levels[0]={levels[0]} = "
            f"{tp * levels[0]}, but a node has {ranks_per_node} ranks (needs sp_levels[0]={intra})"
        )
    return Topology(world_size=world_size, tp=tp, sp=sp, sp_levels=levels)


def _ranks_per_node(nodes: Sequence[str]) -> int:
    """Number of ranks on each node; nodes must have equally many, numbered node by node."""
    order = list(dict.fromkeys(nodes))
    counts = [list(nodes).count(node) for node in order]
    if len(set(counts)) > 1:
        listed = ", ".join(f"{node}: {count}" for node, count in zip(order, counts, strict=True))
        raise ConfigError(f"every node must run equally many ranks, got {listed}")
    expected = [node for node in order for _ in range(counts[0])]
    if list(nodes) != expected:
        raise ConfigError(f"ranks must be numbered node by node, got the order {list(nodes)}")
    return counts[0]


def _natural_levels(tp: int, sp: int, ranks_per_node: int) -> tuple[int, ...]:
    """Levels (ranks of a node, nodes); one level if SP stays inside a node or TP fills it."""
    intra = max(1, ranks_per_node // tp)
    if intra in (1, sp):
        return (sp,)
    return (intra, sp // intra)


def level_of(a: int, b: int, group_sizes: Sequence[int]) -> int:
    """Level of the smallest group with both ranks; 0 for one rank with itself."""
    return next(level for level, size in enumerate(group_sizes) if a // size == b // size)


def group_sizes_of(sp_levels: Sequence[int]) -> tuple[int, ...]:
    """Group sizes (1, ranks of a level-1 group, ..., all ranks) of ring sizes, innermost first.

    For example (2, 4) gives (1, 2, 8).
    """
    return (1, *itertools.accumulate(sp_levels, operator.mul))
