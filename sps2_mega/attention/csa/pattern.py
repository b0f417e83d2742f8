"""Definition of communication-efficient sparse attention (CSA): the keys a query sees, in ints.

Level l joins query i and key j when both lie in one cell of span S_l and in none of a smaller span:

    keys  |........|........|........|....i      degrees (1, 2, 4), spans (S, 2S)
           level 2: 1 key in 4 | level 1: 1 in 2 | level 0: all

Positions, spans, degrees, sinks and halo decide everything; ranks do not occur. `pieces` cuts the
visible pairs into pieces of work, `planner.sparse_volume` counts what is computed and moved.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sps2_mega.errors import ConfigError

MAX_DEGREE = 65536  # plans enumerate residues; more than this is a typing mistake, not a sparsity


@dataclass(frozen=True, slots=True, kw_only=True)
class CSAPattern:
    """Degrees, spans and exceptions of one prompt's sparse attention.

    At level l a KV head sees one key of `degrees[l]`; all 1 is exact attention. `spans[l]` is the
    number of tokens in a cell of level l. The last level has no end, so there is one span less than
    there are degrees. Keys are kept or dropped by blocks of `block` neighbours. The first `sinks`
    tokens and the `halo` keys right before the query's own cell of level 0 are always seen; the
    last `tail` queries of a prompt see all keys. With `sample_queries`, query i takes part in level
    l only for KV heads g with i % degrees[l] == g % degrees[l].

    Raises:
        ConfigError: a number is out of range, or the numbers of spans and degrees do not fit.
    """

    degrees: tuple[int, ...]
    spans: tuple[int, ...]
    sinks: int
    halo: int
    tail: int
    sample_queries: bool
    block: int = 1

    def __post_init__(self) -> None:
        if not self.degrees or min(self.degrees) < 1:
            raise ConfigError(
                f"csa degrees must be one number >= 1 per level, got {_joined(self.degrees)}"
            )
        if max(self.degrees) > MAX_DEGREE:
            raise ConfigError(
                f"csa degrees must be at most {MAX_DEGREE}, got {_joined(self.degrees)}"
            )
        if len(self.spans) != len(self.degrees) - 1:
            raise ConfigError(
                f"csa degrees {_joined(self.degrees)} are {len(self.degrees)} levels and need "
                f"{len(self.degrees) - 1} spans (the last level has no end), "
                f"got {len(self.spans)}: {_joined(self.spans)}"
            )
        if any(span < 1 for span in self.spans) or any(
            outer < inner for inner, outer in itertools.pairwise(self.spans)
        ):
            raise ConfigError(
                "csa spans must be >= 1 and not decrease from level to level, got "
                f"{_joined(self.spans)}"
            )
        for name in ("sinks", "halo", "tail"):
            if getattr(self, name) < 0:
                raise ConfigError(f"csa {name} must be >= 0 tokens, got {getattr(self, name)}")
        if self.block < 1:
            raise ConfigError(f"csa block must be >= 1 token, got {self.block}")
        if self.block > 1 and (self.degrees[0] > 1 or self.sample_queries):
            # The own cell is a triangle, which a stride of blocks would cut into steps.
            raise ConfigError(
                f"csa block {self.block} keeps blocks of far keys: it needs degree 1 in the own "
                f"cell, got degrees {_joined(self.degrees)}, and no sampled queries"
            )

    @property
    def exact(self) -> bool:
        """True where every query sees every earlier key."""
        return all(degree == 1 for degree in self.degrees)

    def level(self, i: int, j: int) -> int:
        """Return the level that joins query i and key j: the smallest whose cells hold both."""
        for level, span in enumerate(self.spans):
            if i // span == j // span:
                return level
        return len(self.spans)

    def own_start(self, i: int) -> int:
        """Return the first position of query i's own cell of level 0."""
        return i // self.spans[0] * self.spans[0] if self.spans else 0

    def always_seen(self, i: int, j: int) -> bool:
        """Tell whether key j is a sink, or in the halo of query i."""
        own = self.own_start(i)
        return j < self.sinks or own - self.halo <= j < own

    def sees(self, i: int, j: int, *, kv_head: int, layer: int, prompt_len: int) -> bool:
        """Tell whether the query heads of `kv_head` at position i see key j in `layer`.

        `kv_head` is numbered over all ranks. This is the definition, pair by pair; everything else
        in this package is measured against it.
        """
        if j > i:
            return False
        if i >= prompt_len - self.tail or self.always_seen(i, j):
            return True
        degree = self.degrees[self.level(i, j)]
        if self.sample_queries and i % degree != kv_head % degree:
            return False
        return j // self.block % degree == residue(kv_head, layer, degree)


def residue(kv_head: int, layer: int, degree: int) -> int:
    """Return the residue of the keys j that a KV head keeps: j // block % degree == residue.

    It rotates with the layer, so that fewer heads than `degree` still cover all positions.
    """
    return (kv_head + layer) % degree


def tail_starts(patterns: Sequence[CSAPattern], prompt_lens: Sequence[int]) -> list[int]:
    """Return the position of each prompt from which on queries see all keys as its tail.

    Exact patterns need no tail.
    """
    return [
        length if pattern.exact else max(0, length - pattern.tail)
        for pattern, length in zip(patterns, prompt_lens, strict=True)
    ]


def topology_spans(shard_len: int, group_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return spans that follow the ranks: cells of one rank, one node and so on.

    Each rank has `shard_len` tokens. `group_sizes` are the ranks of one group of each level, (1,
    ..., all); the last level needs no span.
    """
    if shard_len < 1:
        raise ConfigError(f"spans from the topology need >= 1 token per rank, got {shard_len}")
    return tuple(shard_len * size for size in group_sizes[:-1])


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)) or "none"
