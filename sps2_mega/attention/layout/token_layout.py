"""Layout of a prefill step's tokens on SP ranks: pure ints, made once for all transports.

A sequence is cut into runs of neighbouring tokens that lie on one SP rank. Queries are the tokens
that the step computes; keys are these and the cached tokens of their sequences. Tokens occur in
three orders:

    local       tokens of one rank by sequence, then position; among keys, cached ones first
    rank-major  local tokens of all ranks one after another, as a gather or all-to-all delivers
    sequence    by sequence, then position, as attention needs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [start, end) of `sequence`, from `local_start` on among the tokens of `rank`."""

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
        """Rows of the run among its rank's tokens."""
        return slice(self.local_start, self.local_start + self.end - self.start)


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Tokens [first[s], last[s]) of each sequence s.

    `runs` are in sequence order; `counts[r]` is the number of tokens on SP rank r, maybe 0.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    counts: tuple[int, ...]
    runs: tuple[Run, ...]

    def local_runs(self, rank: int) -> list[Run]:
        """Return a rank's runs in sequence order, which for keys may differ from local order."""
        return [run for run in self.runs if run.rank == rank]

    def seq_starts(self) -> list[int]:
        """Return the index of each sequence's first token in sequence order."""
        lengths = [last - first for first, last in zip(self.first, self.last, strict=True)]
        return [0, *np.cumsum(lengths).tolist()][:-1]

    def rank_major_index(self) -> np.ndarray | None:
        """Return each token's index in rank-major order, by sequence order; None if they agree."""
        starts = np.concatenate(([0], np.cumsum(self.counts)))
        pieces = [
            np.arange(run.num_tokens) + (starts[run.rank] + run.local_start) for run in self.runs
        ]
        index = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        return None if np.array_equal(index, np.arange(len(index))) else index


@dataclass(frozen=True, slots=True)
class PrefillLayout:
    """Tokens that a step computes (`queries`) and that they may see (`keys`).

    The keys of sequence s are its tokens [0, queries.last[s]). On each rank the cached ones come
    first among local keys. Where nothing was cached before, both are the same object.
    """

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
    """Lay out a step that computes tokens [starts[s], ends[s]) of each sequence s.

    Earlier tokens are in the cache; by default there are none. Block b, the tokens from
    b * block_size on, lies on rank `block_ranks[s][b]`. Starts may cut a block.
    """
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
    """Return the runs of tokens [start, end), appended to the `counts` tokens of each rank."""
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
