"""How long the next layers of a prefill, and the next decode step, are expected to take.

Learns from steps that were measured and decides nothing: who yields to whom is `prefill_queue`'s and the scheduler's.
Pure Python without a clock.

A layer's seconds per FLOP fall with its size, since small ones are mostly overhead. So they are remembered by size
class, a power of two, and the nearest class answers. Many short prompts then say nothing about long ones.
"""

from __future__ import annotations

from sps2_mega.engine.layer_work import LayerWork

_NEWEST = 0.5  # the weight of the newest measurement
_FORGET = 0.2  # how fast the longest decode step is forgotten


class Pace:
    """`decode_s` are the seconds of a decode step: the longest of the last few, since being late costs more than
    yielding early. 0 before the first."""

    def __init__(self, work: LayerWork) -> None:
        self.work = work
        self.decode_s = 0.0
        self._seconds_per_flop: dict[int, float] = {}

    def decoded(self, seconds: float) -> None:
        """A decode step took so long."""
        self.decode_s += max(seconds - self.decode_s, _FORGET * (seconds - self.decode_s))

    def computed(self, flops: int, seconds: float) -> None:
        """One layer with so many FLOPs took so long."""
        size, rate = flops.bit_length(), seconds / flops
        known = self._seconds_per_flop.get(size, rate)
        self._seconds_per_flop[size] = _NEWEST * rate + (1 - _NEWEST) * known

    def layer_s(self, flops: int) -> float | None:
        """Expected seconds of one layer with so many FLOPs; None before anything was measured."""
        if not self._seconds_per_flop:
            return None
        size = flops.bit_length()
        nearest = min(self._seconds_per_flop, key=lambda known: (abs(known - size), -known))
        return flops * self._seconds_per_flop[nearest]

    def prompt_s(self, start: int, end: int) -> float:
        """Expected seconds of tokens [start, end) of a prompt in all layers; 0 before anything was measured."""
        layer_s = self.layer_s(self.work.flops(start, end)) if end > start else None
        return 0.0 if layer_s is None else self.work.num_layers * layer_s

    def tokens_within(self, seconds: float, start: int, end: int, quantum: int) -> int:
        """How many of the tokens [start, end) one layer is expected to compute in so many seconds: a multiple of
        `quantum`, at least one of them, or all; one `quantum` before anything was measured."""
        fits, fails = 1, -(-(end - start) // quantum) + 1
        while fails - fits > 1:
            middle = (fits + fails) // 2
            layer_s = self.layer_s(self.work.flops(start, min(end, start + middle * quantum)))
            if layer_s is not None and layer_s <= seconds:
                fits = middle
            else:
                fails = middle
        return min(end - start, fits * quantum)
