"""Where the layers of a long prompt may be cut: behind chunks of tokens that all take about as long,
and that every SP rank has an equal share of.

    chunks        |      a      |     b    |   c   |  d | e |      later ones see more keys, so they are shorter
    rank 0       |aaaaaaa      |bbbbb     |cccc   |dd  |e  |
    rank 1       |      aaaaaaa|     bbbbb|   cccc|  dd| ee|

Decides where cuts are possible; which of them a slice goes up to is `prefill_queue`'s choice, from
step to step.
"""

from __future__ import annotations

from sps2_mega.scheduler.step_times import StepTimeModel

# Chunks in a slice: with fewer it misses its room by more, with more its queries are in smaller
# pieces on every rank.
CHUNKS = 6
_GROWN = 1.05  # chunks have one length until so many times as much is before them


def chunk_lengths(
    step_times: StepTimeModel, start: int, end: int, room_s: float, *, unit: int, at_first: int
) -> tuple[int, ...]:
    """Tokens of each chunk of the tokens [start, end) of a prompt, of which a slice has about
    `CHUNKS` in `room_s` seconds: multiples of `unit` but for the last. Before anything was measured
    all have `at_first` tokens."""
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
