"""Layout of a stretch of one prompt's tokens, numbered from its beginning on each SP rank.

Pure ints.

    prompt   rank 0 [0..7]  rank 1 [8..15]  rank 0 [16..23]  rank 1 [24..30]      stripes of 8
    stretch [12, 26)              [12..15]         [16..23]         [24..25]
    rows     rank 0: 8 from its local token 8 on, rank 1: 6 from its local token 4 on
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import islice

from sps2_mega.attention.layout.token_layout import Run, TokenLayout


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring tokens of a prompt.

    `tokens` has its runs with local numbers of the stretch. Its first token on rank r is local
    token `first_rows[r]` of the prompt; 0 where the rank has none.
    """

    tokens: TokenLayout
    first_rows: tuple[int, ...]

    def rows(self, rank: int) -> slice:
        """Return the rows of the stretch among the prompt's local tokens on a rank."""
        first = self.first_rows[rank]
        return slice(first, first + self.tokens.counts[rank])


def stretch(layout: TokenLayout, start: int, end: int) -> Stretch:
    """Cut positions [start, end) out of a layout of one sequence, local tokens in their order."""
    assert len(layout.first) == 1, f"chunks are cut from one sequence, got {len(layout.first)}"
    assert layout.first[0] <= start <= end <= layout.last[0], (
        f"[{start}, {end}) of tokens [{layout.first[0]}, {layout.last[0]})"
    )
    size = len(layout.counts)
    first_rows: list[int | None] = [None] * size
    counts = [0] * size
    runs: list[Run] = []
    number = max(0, bisect_right(layout.runs, start, key=_start) - 1)
    for run in islice(layout.runs, number, None):
        if run.start >= end:
            break
        low, high = max(run.start, start), min(run.end, end)
        if low >= high:
            continue
        row = run.local_start + low - run.start
        first = first_rows[run.rank]
        if first is None:
            first = first_rows[run.rank] = row
        runs.append(Run(run.sequence, run.rank, low, high, row - first))
        counts[run.rank] += high - low
    return Stretch(
        TokenLayout((start,), (end,), tuple(counts), tuple(runs)),
        tuple(first or 0 for first in first_rows),
    )


def _start(run: Run) -> int:
    return run.start
