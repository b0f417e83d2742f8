"""Where the tokens of a prefill step are: pure ints, made once per step and read by every
transport.

A sequence is cut into runs of neighbouring tokens that lie on one sp rank. Queries are the tokens
that the step computes; keys are those and what the cache holds of their sequences already. Three
orders of tokens occur:

    local       the tokens of one rank: by sequence, then position; of keys, those from the cache come first
    rank-major  all ranks' local tokens one after another (what a gather or an all-to-all delivers)
    sequence    by sequence, then position (what attention wants)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [start, end) of `sequence`, at `local_start`.. among the tokens of sp rank `rank`."""

    sequence: int
    rank: int
    start: int
    end: int
    local_start: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def local(self) -> slice:
        """Where the run stands among its rank's tokens."""
        return slice(self.local_start, self.local_start + self.end - self.start)


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Tokens [first[s], last[s]) of each sequence s. `runs` are in sequence order; `counts[r]` is
    the number of tokens on sp rank r (may be 0)."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    counts: tuple[int, ...]
    runs: tuple[Run, ...]

    def local_runs(self, rank: int) -> list[Run]:
        """In sequence order, which among keys is not always the local one."""
        return [run for run in self.runs if run.rank == rank]

    def seq_starts(self) -> list[int]:
        """Index of each sequence's first token in sequence order."""
        lengths = [last - first for first, last in zip(self.first, self.last, strict=True)]
        return [0, *np.cumsum(lengths).tolist()][:-1]

    def rank_major_index(self) -> np.ndarray | None:
        """For each token in sequence order its index in rank-major order; None when the orders
        agree."""
        starts = np.concatenate(([0], np.cumsum(self.counts)))
        pieces = [
            np.arange(run.num_tokens) + (starts[run.rank] + run.local_start) for run in self.runs
        ]
        index = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        return None if np.array_equal(index, np.arange(len(index))) else index


@dataclass(frozen=True, slots=True)
class PrefillLayout:
    """What a step computes (`queries`) and all that it may look at (`keys`): of every sequence s
    the keys are the tokens [0, queries.last[s]); on each rank those that were cached before come
    first among local keys. Nothing cached before: both are the same object."""

    queries: TokenLayout
    keys: TokenLayout


def build_layout(
    block_ranks: Sequence[Sequence[int]],
    ends: Sequence[int],
    *,
    block_size: int,
    sp_size: int,
    starts: Sequence[int] | None = None,
) -> PrefillLayout:
    """Layout of a step that computes tokens [starts[s], ends[s]) of each sequence (default: from 0)
    and finds those before in the cache. Block b (tokens b*block_size..) lies on rank
    `block_ranks[s][b]`; starts may cut a block."""
    zeros = (0,) * len(ends)
    starts = zeros if starts is None else tuple(starts)
    counts = [0] * sp_size
    place = (block_ranks, block_size, counts)
    cached = [_runs(s, 0, start, *place) for s, start in enumerate(starts)]
    num_cached = tuple(counts)
    new = [
        _runs(s, first, end, *place)
        for s, (first, end) in enumerate(zip(starts, ends, strict=True))
    ]
    keys = TokenLayout(
        zeros,
        tuple(ends),
        tuple(counts),
        tuple(run for both in zip(cached, new, strict=True) for part in both for run in part),
    )
    if not any(num_cached):
        return PrefillLayout(keys, keys)
    queries = TokenLayout(
        starts,
        tuple(ends),
        tuple(count - before for count, before in zip(counts, num_cached, strict=True)),
        tuple(
            replace(run, local_start=run.local_start - num_cached[run.rank])
            for part in new
            for run in part
        ),
    )
    return PrefillLayout(queries, keys)


def _runs(
    sequence: int,
    start: int,
    end: int,
    block_ranks: Sequence[Sequence[int]],
    block_size: int,
    counts: list[int],
) -> list[Run]:
    """Runs of tokens [start, end), appended to what `counts` says is on each rank already."""
    ranks = block_ranks[sequence]
    runs = []
    while start < end:
        block = start // block_size
        rank = ranks[block]
        while block < len(ranks) and block * block_size < end and ranks[block] == rank:
            block += 1
        stop = min(block * block_size, end)
        runs.append(Run(sequence, rank, start, stop, counts[rank]))
        counts[rank] += stop - start
        start = stop
    return runs
