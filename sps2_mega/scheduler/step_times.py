"""Expected seconds of the next layers of a prefill and of the next decode step.

Learns from measured steps and decides nothing: `prefill_queue` and the scheduler decide what yields
to what. Pure Python without a clock.

A layer's seconds per FLOP fall with its size, since small layers are mostly overhead. So they are
remembered by size class, a power of two, and the nearest class answers; many short prompts then say
nothing about long ones. Chunks are remembered by their place in the prompt: early ones are
dominated by weights, late ones by attention, which run at different speeds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

from sps2_mega.scheduler.layer_flops import LayerFlops

_NEWEST = 0.5  # the weight of the newest measurement
_NEWEST_SPEED = 0.25  # there are many chunks, so their common factor is learnt soon
_NEWEST_RATE = 0.1
_PLACES = 4  # per doubling of the position
_FAR = 2.5
_FORGET = 0.2  # the weight of the newest decode step


class StepTimeModel:
    """Learnt seconds: `decode_mean_s` of a decode step, and `decode_s` that few of them exceed.

    Both are 0 before the first step.
    """

    def __init__(self, layer_flops: LayerFlops) -> None:
        self.layer_flops = layer_flops
        self.decode_mean_s = self._decode_spread_s = 0.0
        self._seconds_per_flop: dict[int, float] = {}
        # Seconds per FLOP are the machine's present speed times a rate by place: rates of the last
        # layer, where attention may be next to nothing, are apart.
        self._chunk_speed = 1.0
        self._chunk_rates: tuple[dict[int, float], dict[int, float]] = ({}, {})

    @property
    def decode_s(self) -> float:
        """Seconds that few decode steps exceed."""
        return self.decode_mean_s + self._decode_spread_s

    def decoded(self, seconds: float) -> None:
        """Record a decode step."""
        if not self.decode_mean_s:
            self.decode_mean_s = seconds
        seconds = self.decode_mean_s * _credible(seconds / self.decode_mean_s)
        off = abs(seconds - self.decode_mean_s)
        self.decode_mean_s += _FORGET * (seconds - self.decode_mean_s)
        self._decode_spread_s += _FORGET * (off - self._decode_spread_s)

    def computed(self, flops: int, seconds: float) -> None:
        """Record one layer with so many FLOPs."""
        size, rate = flops.bit_length(), seconds / flops
        known = self._seconds_per_flop.get(size, rate)
        self._seconds_per_flop[size] = _NEWEST * rate + (1 - _NEWEST) * known

    def computed_chunks(self, chunks: Sequence[tuple[int, int, int]], seconds: float) -> None:
        """Record chunks (layer, start, end) of a prompt that took `seconds` together."""
        flops = [self.layer_flops.flops(start, end) for _, start, end in chunks]
        shares = [self.chunk_s(*chunk) or count for chunk, count in zip(chunks, flops, strict=True)]
        off = seconds / sum(shares)
        all_known, speed = True, self._chunk_speed
        for (layer, start, end), count, share in zip(chunks, flops, shares, strict=True):
            last = self._is_last(layer)
            rates, place = self._chunk_rates[last], _place(start, end)
            if place in rates:
                rates[place] *= 1 + _NEWEST_RATE * (_credible(off) - 1)
            else:
                rates[place] = off * share / count / speed
                all_known = False
            if not last:
                self.computed(count, off * share)
        if all_known:
            self._chunk_speed *= 1 + _NEWEST_SPEED * (_credible(off) - 1)

    def layer_s(self, flops: int) -> float | None:
        """Expected seconds of one layer with so many FLOPs; None before anything was measured."""
        return _nearest(self._seconds_per_flop, flops.bit_length(), flops)

    def chunk_s(self, layer: int, start: int, end: int) -> float | None:
        """Expected seconds of tokens [start, end) in a layer; None before anything was measured."""
        flops = self.layer_flops.flops(start, end)
        usual, last = self._chunk_rates
        rates = last if last and self._is_last(layer) else usual
        if not rates:
            return self.layer_s(flops)
        known = _nearest(rates, _place(start, end), flops)
        return known and known * self._chunk_speed

    def prompt_s(self, start: int, end: int) -> float:
        """Expected seconds of tokens [start, end) in all layers; 0 before anything was measured."""
        layer_s = self.layer_s(self.layer_flops.flops(start, end)) if end > start else None
        return 0.0 if layer_s is None else self.layer_flops.num_layers * layer_s

    def tokens_within(self, seconds: float, start: int, end: int, quantum: int) -> int:
        """Number of tokens [start, end) that one layer is expected to compute in that time.

        A multiple of `quantum`, at least one of them, or all tokens; one `quantum` before anything
        was measured.
        """
        return _most(
            lambda stop: self.layer_s(self.layer_flops.flops(start, stop)),
            seconds,
            start,
            end,
            quantum,
        )

    def chunk_within(self, seconds: float, start: int, end: int, quantum: int) -> int:
        """`tokens_within` for a chunk of any layer but the last."""
        return _most(lambda stop: self.chunk_s(0, start, stop), seconds, start, end, quantum)

    def furthest(self, seconds: float, layer: int, start: int, ends: Sequence[int]) -> int:
        """Last of `ends` that a chunk from `start` on is expected to reach in so many seconds.

        `ends` is ascending and not empty; the first one where nothing is known or none is reached.
        """

        def takes_longer(end: int) -> bool:
            needed = self.chunk_s(layer, start, end)
            return needed is None or needed > seconds

        return ends[max(0, bisect_left(ends, True, key=takes_longer) - 1)]

    def _is_last(self, layer: int) -> bool:
        return self.layer_flops.num_layers > 1 and layer == self.layer_flops.num_layers - 1


def _credible(off: float) -> float:
    """Bounded ratio of a step's seconds to the expected ones.

    A step that is far off is more often a disturbance than news, and news comes again.
    """
    return min(max(off, 1 / _FAR), _FAR)


def _place(start: int, end: int) -> int:
    return int(_PLACES * math.log2(max(1, start + end)))


def _nearest(rates: dict[int, float], kind: int, flops: int) -> float | None:
    if not rates:
        return None
    return flops * rates[min(rates, key=lambda known: (abs(known - kind), -known))]


def _most(
    expected_s: Callable[[int], float | None], seconds: float, start: int, end: int, quantum: int
) -> int:
    fits, fails = 1, -(-(end - start) // quantum) + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        needed = expected_s(min(end, start + middle * quantum))
        if needed is not None and needed <= seconds:
            fits = middle
        else:
            fails = middle
    return min(end - start, fits * quantum)
