"""Definition of the share of a prefill step's communication that computation hides.

in flight    [--- k ---][-- q --]   [--- q ---]        total    = length of the union
blocked      [--- wait ---]               [ w ]        exposed  = sum of waits
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Interval = tuple[float, float]  # seconds, start <= end


@dataclass(frozen=True, slots=True, kw_only=True)
class CommSeconds:
    """Communication of one or several prefill steps on this rank.

    `total_comm_s` is the time with at least one exchange in flight, from its post to its
    completion; `exposed_comm_s` the part of it in which the rank waited instead of computing.
    """

    exposed_comm_s: float = 0.0
    total_comm_s: float = 0.0

    @property
    def overlap(self) -> float:
        """Hidden share of the communication in [0, 1]; 0 without communication."""
        if self.total_comm_s <= 0.0:
            return 0.0
        return min(1.0, max(0.0, 1.0 - self.exposed_comm_s / self.total_comm_s))

    def __add__(self, other: CommSeconds) -> CommSeconds:
        return CommSeconds(
            exposed_comm_s=self.exposed_comm_s + other.exposed_comm_s,
            total_comm_s=self.total_comm_s + other.total_comm_s,
        )


def covered(intervals: Iterable[Interval]) -> float:
    """Return the length of the union of intervals, in their unit."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        if stop > end:
            total += stop - max(start, end)
            end = stop
    return total
