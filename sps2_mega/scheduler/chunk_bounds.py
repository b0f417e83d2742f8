"""Bounds at which the layers of a long prompt may be cut into chunks that all take about as long.

Every SP rank has an equal share of each chunk:

    chunks       |      a      |     b    |   c   |  d | e |     later chunks see more keys,
    rank 0       |aaaaaaa      |bbbbb     |cccc   |dd  |e  |     so they are shorter
    rank 1       |      aaaaaaa|     bbbbb|   cccc|  dd| ee|

Decides where cuts are possible; `prefill_queue` chooses in each step how far a slice goes.
"""

from __future__ import annotations

from sps2_mega.scheduler.step_times import StepTimeModel

# Chunks per slice: with fewer a slice misses its time by more, with more its queries are in smaller
# pieces on every rank.
CHUNKS = 6
_GROWN = 1.05  # growth of the position after which chunks get a new length


def chunk_lengths(
    step_times: StepTimeModel, start: int, end: int, room_s: float, *, unit: int, at_first: int
) -> tuple[int, ...]:
    """Tokens of each chunk of the tokens [start, end) of a prompt.

    A slice of `room_s` seconds has about `CHUNKS` of them. Lengths are multiples of `unit` except
    the last one. Before anything was measured all chunks have `at_first` tokens.
    """
    lengths: list[int] = []
    is_known = step_times.chunk_s(0, start, end) is not None
    position, valid_to, length = start, 0.0, at_first
    while position < end:
        if is_known and position >= valid_to:
            fitting = step_times.chunk_within(room_s / CHUNKS, position, end, unit)
            length = max(unit, fitting // unit * unit)
            valid_to = _GROWN * position
        lengths.append(min(length, end - position))
        position += lengths[-1]
    return tuple(lengths)
