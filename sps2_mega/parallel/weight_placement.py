"""Placement of a step's feed-forward and output layers: rows stay with their owner, or SP ranks
share the reading of weights.

Every SP rank holds all weights of these layers. With `owner`, each rank computes its own rows, so a
rank with one row reads all weights and a rank without rows waits. With `sliced`, each rank computes
its slice of the weights for the rows of all, at the price of two small exchanges per layer. Seconds
of both are measured at start, and the choice follows from the rows of each rank alone, so that all
ranks make the same one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Placement = Literal["owner", "sliced"]


@dataclass(frozen=True, slots=True)
class PlacementTimes:
    """Measured seconds of a layer by number of rows, on the slowest rank.

    `rows` ascend. `alone_s` is the owner's time while the other ranks wait, `busy_s` while all
    ranks compute that many rows each: ranks on one machine share its memory. `sliced_s` is for
    that many rows in all, exchanges included.
    """

    rows: tuple[int, ...]
    alone_s: tuple[float, ...]
    busy_s: tuple[float, ...]
    sliced_s: tuple[float, ...]

    def owner(self, rows_by_rank: Sequence[int]) -> float:
        """Seconds with `owner`: those of the rank with the most rows."""
        most, active = max(rows_by_rank), sum(rows > 0 for rows in rows_by_rank)
        if not most:
            return 0.0
        alone, busy = (_at(most, self.rows, seconds) for seconds in (self.alone_s, self.busy_s))
        crowd = (active - 1) / (len(rows_by_rank) - 1) if len(rows_by_rank) > 1 else 0.0
        return alone + crowd * max(0.0, busy - alone)

    def sliced(self, rows_by_rank: Sequence[int]) -> float:
        """Seconds with `sliced`."""
        return _at(sum(rows_by_rank), self.rows, self.sliced_s)


def choose_placement(times: PlacementTimes, rows_by_rank: Sequence[int]) -> Placement:
    """The faster placement of a step with these rows on each SP rank."""
    if times.sliced(rows_by_rank) < times.owner(rows_by_rank):
        return "sliced"
    return "owner"


@dataclass(frozen=True, slots=True)
class WeightPlacement:
    """Placements of a job: forced, or chosen by the times of both kinds of layers."""

    forced: Placement | None = "owner"
    feed_forward: PlacementTimes | None = None
    output: PlacementTimes | None = None

    def sliced_layers(self, rows_by_rank: Sequence[int]) -> bool:
        """Whether feed-forward layers are sliced in a step with these rows on each SP rank."""
        return self._sliced(self.feed_forward, rows_by_rank)

    def sliced_output(self, rows_by_rank: Sequence[int]) -> bool:
        """Whether the output layer is, with these sampled rows."""
        return self._sliced(self.output, rows_by_rank)

    def _sliced(self, times: PlacementTimes | None, rows_by_rank: Sequence[int]) -> bool:
        if len(rows_by_rank) == 1 or not any(rows_by_rank):
            return False
        if self.forced is not None or times is None:
            return self.forced == "sliced"
        return choose_placement(times, rows_by_rank) == "sliced"


def _at(rows: int, known: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds at a number of rows: between two known numbers on the line through both, beyond the
    last one on the line through the last two."""
    if rows <= known[0] or len(known) == 1:
        return seconds[0]
    last = min(bisect_right(known, rows), len(known) - 1)
    width, climb = known[last] - known[last - 1], seconds[last] - seconds[last - 1]
    return seconds[last - 1] + max(0.0, climb) * (rows - known[last - 1]) / width
