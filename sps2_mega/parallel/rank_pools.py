"""Which ranks prefill and which decode: the job's ranks cut into one or two sides, each with a
shape of its own.

    tp=2 sp=2, no decode ranks      all      0 1 2 3
    tp=1 sp=2, decode_ranks=4       prefill  0 1 | decode  2 3 4 5   (tp = decode_tp, sp = 4 / decode_tp)

Decides counts only; groups within a side are `topology`'s, and nothing here looks at the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sps2_mega.config import ParallelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.topology import check_degrees

SideName = Literal["all", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPool:
    """Ranks [first, first + tp * sp) of the job, which form a world of their own."""

    name: SideName
    first: int
    tp: int
    sp: int

    @property
    def size(self) -> int:
        return self.tp * self.sp

    @property
    def global_ranks(self) -> range:
        return range(self.first, self.first + self.size)

    def global_rank(self, *, tp_rank: int, sp_rank: int) -> int:
        """The rank in the job of one of this side's ranks."""
        return self.first + tp_rank + self.tp * sp_rank


def split_rank_pools(parallel: ParallelConfig, world_size: int) -> tuple[RankPool, ...]:
    """One side of all ranks, or (prefill, decode).

    Raises:
        ConfigError: the degrees contradict each other or the number of ranks; all of them are
            named.
    """
    tp, sp, decode = parallel.tp, parallel.sp, parallel.decode_ranks
    if decode == 0:
        if parallel.decode_tp is not None:
            raise ConfigError(f"decode_tp={parallel.decode_tp} needs decode_ranks, which is 0")
        check_degrees(tp=tp, sp=sp, world_size=world_size)
        return (RankPool(name="all", first=0, tp=tp, sp=sp),)
    if tp < 1 or sp < 1:
        check_degrees(tp=tp, sp=sp, world_size=world_size)
    decode_tp = tp if parallel.decode_tp is None else parallel.decode_tp
    if decode < 0 or decode_tp < 1 or decode % decode_tp:
        raise ConfigError(
            f"decode_ranks must be a multiple of the decode side's tp: decode_ranks={decode}, "
            f"decode_tp={decode_tp}{' (from tp)' if parallel.decode_tp is None else ''}"
        )
    if tp * sp + decode != world_size:
        raise ConfigError(
            f"tp * sp + decode_ranks must equal the number of ranks: tp={tp} * sp={sp} + "
            f"decode_ranks={decode} = {tp * sp + decode}, "
            f"but {world_size} rank{'s were' if world_size != 1 else ' was'} started"
        )
    return (
        RankPool(name="prefill", first=0, tp=tp, sp=sp),
        RankPool(name="decode", first=tp * sp, tp=decode_tp, sp=decode // decode_tp),
    )


def rank_pool_of(sides: Sequence[RankPool], global_rank: int) -> RankPool:
    """The side that a rank of the job belongs to."""
    return next(side for side in sides if global_rank in side.global_ranks)
