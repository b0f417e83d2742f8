"""Timing of calls on all ranks at once; the slowest rank's time is the answer on all of them.

A time is the median of several means: a call may take once or twice as long by chance, which
belongs to its price, but a moment in which a shared machine does something else does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from sps2_mega.comm.probe import agree_most
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.parallel.groups import Group

PEAK_WIDTH = {"cpu": 1024, "cuda": 8192}  # width of the square product that is timed first
LONG_ENOUGH_S = 1.0  # the speed of a shared machine changes from moment to moment
_MOST_ROUNDS = 200
_MEANS = 5


class Timer:
    """Timer of collective calls; also keeps the peak rate, which every rank measures first."""

    def __init__(self, rank: StartedRank) -> None:
        self.device, self.dtype = rank.compute.device, rank.compute.dtype
        self.control: Group = rank.groups.control
        width = PEAK_WIDTH[self.device.type]
        square = torch.ones(width, width, dtype=self.dtype, device=self.device)
        self.peak_s = self.agreed(lambda: square @ square)

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def agreed(self, call: Callable[[], object], *, least: int = 2) -> float:
        """Seconds of a call on the slowest rank; all ranks repeat it equally often.

        They make `least` calls or more.
        """
        call()  # the first may compile or allocate
        once = agree_most(self._seconds(call, 1), self.control)
        rounds = max(least, min(_MOST_ROUNDS, int(LONG_ENOUGH_S / max(once, 1e-9))))
        means = min(_MEANS, rounds)
        return median(
            agree_most(self._seconds(call, -(-rounds // means)), self.control) for _ in range(means)
        )

    def _seconds(self, call: Callable[[], object], rounds: int) -> float:
        self.finish()
        began = time.perf_counter()
        for _ in range(rounds):
            call()
        self.finish()
        return (time.perf_counter() - began) / rounds

    def finish(self) -> None:
        """Wait for the device: a time has a meaning only then."""
        if not self.on_cpu:
            torch.cuda.synchronize(self.device)
