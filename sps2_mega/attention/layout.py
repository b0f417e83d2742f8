"""Where the tokens of a prefill step are: pure ints, made once per step and read by every transport.

A sequence is cut into runs of neighbouring tokens that lie on one sp rank. Three orders of tokens occur:

    local       the tokens of one rank: by sequence, then position
    rank-major  all ranks' local tokens one after another (what a gather or an all-to-all delivers)
    sequence    by sequence, then position (what attention wants)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [start, end) of `sequence`, at `local_start`.. among the tokens of sp rank `rank`."""

    sequence: int
    rank: int
    start: int
    end: int
    local_start: int


@dataclass(frozen=True, slots=True)
class PrefillLayout:
    """`runs` are in sequence order; `counts[r]` is the number of tokens on sp rank r (may be 0)."""

    seq_lens: tuple[int, ...]
    counts: tuple[int, ...]
    runs: tuple[Run, ...]

    def local_runs(self, rank: int) -> list[Run]:
        return [run for run in self.runs if run.rank == rank]

    def seq_starts(self) -> list[int]:
        """Index of each sequence's first token in sequence order."""
        return [0, *np.cumsum(self.seq_lens).tolist()][:-1]

    def rank_major_index(self) -> np.ndarray | None:
        """For each token in sequence order its index in rank-major order; None when the orders agree."""
        starts = np.concatenate(([0], np.cumsum(self.counts)))
        pieces = [
            np.arange(run.end - run.start) + (starts[run.rank] + run.local_start)
            for run in self.runs
        ]
        index = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        return None if np.array_equal(index, np.arange(len(index))) else index


def build_layout(
    block_ranks: Sequence[Sequence[int]],
    seq_lens: Sequence[int],
    *,
    block_size: int,
    sp_size: int,
) -> PrefillLayout:
    """Layout of whole sequences whose block b (tokens b*block_size..) lies on rank `block_ranks[s][b]`."""
    counts = [0] * sp_size
    runs = []
    for sequence, (ranks, length) in enumerate(zip(block_ranks, seq_lens, strict=True)):
        block = 0
        num_blocks = -(-length // block_size)
        while block < num_blocks:
            rank, first = ranks[block], block
            while block < num_blocks and ranks[block] == rank:
                block += 1
            start, end = first * block_size, min(block * block_size, length)
            runs.append(Run(sequence, rank, start, end, counts[rank]))
            counts[rank] += end - start
    return PrefillLayout(tuple(seq_lens), tuple(counts), tuple(runs))


def split_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> list[tuple[range, range]]:
    """Query heads of each rank (contiguous, as equal as possible, maybe none) and the KV heads they use."""
    repeats = num_heads // num_kv_heads
    shares = []
    for rank in range(num_ranks):
        heads = range(rank * num_heads // num_ranks, (rank + 1) * num_heads // num_ranks)
        last = (heads[-1] // repeats + 1) if heads else heads.start // repeats
        shares.append((heads, range(heads.start // repeats, last)))
    return shares


def group_heads(heads: range, repeats: int) -> list[tuple[range, int]]:
    """Cut a range of query heads where the KV head changes: (query heads, KV head) pieces."""
    pieces = []
    start = heads.start
    while start < heads.stop:
        stop = min(heads.stop, (start // repeats + 1) * repeats)
        pieces.append((range(start, stop), start // repeats))
        start = stop
    return pieces
