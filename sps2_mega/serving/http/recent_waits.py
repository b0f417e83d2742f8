"""Recent waits of clients: percentiles of TTFT and TBT over a sliding minute.

`sps2_mega.metrics` defines both; `prometheus` has the totals since the start.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sps2_mega.metrics import DurationHistogram, TokenWaits

WINDOW_S = 60.0
_SLICE_S = 5.0


@dataclass(slots=True)
class _Slice:
    """Waits that ended within `_SLICE_S` seconds."""

    began: float
    ttft: DurationHistogram = field(default_factory=DurationHistogram)
    tbt: DurationHistogram = field(default_factory=DurationHistogram)


class RecentWaits:
    """Histograms of recent waits; the window bounds their memory, however many tokens there are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start empty; `clock` gives seconds."""
        self._clock = clock
        self._slices: deque[_Slice] = deque()

    def add(self, waits: TokenWaits) -> None:
        if not waits.ttfts_s and not waits.gaps_s:
            return
        now = self._forget()
        if not self._slices or now - self._slices[-1].began >= _SLICE_S:
            self._slices.append(_Slice(now))
        newest = self._slices[-1]
        for seconds in waits.ttfts_s:
            newest.ttft.add(seconds)
        for seconds in waits.gaps_s:
            newest.tbt.add(seconds)

    def histograms(self) -> tuple[DurationHistogram, DurationHistogram]:
        """TTFT and TBT histograms of the window."""
        self._forget()
        ttft = _sum([part.ttft for part in self._slices])
        return ttft, _sum([part.tbt for part in self._slices])

    def _forget(self) -> float:
        """Drop slices that began before the window; return the time."""
        now = self._clock()
        while self._slices and now - self._slices[0].began > WINDOW_S:
            self._slices.popleft()
        return now


def _sum(parts: list[DurationHistogram]) -> DurationHistogram:
    whole = DurationHistogram()
    for part in parts:
        whole.count += part.count
        for bucket, count in part.buckets.items():
            whole.buckets[bucket] = whole.buckets.get(bucket, 0) + count
    return whole
