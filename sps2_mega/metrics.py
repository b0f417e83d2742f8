"""Seconds per request and their percentiles: the only definitions of TTFT, TBT and throughput.

    arrival ---- scheduled ---- first token ---- ... ---- last token
    |-- queue_s --|             |                          |
    |-------- ttft_s -----------|-- gaps_s, one per token -|      per_token_s = their mean
    |------------------------ total_s ---------------------|

Decides nothing about where numbers are shown.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from sps2_mega.outputs import Timings
from sps2_mega.types import Sequence


def timings_of(sequence: Sequence) -> Timings:
    """Timings of an ended sequence; one that ended without a token counts up to now."""
    times = sequence.token_times
    end = times[-1] if times else time.monotonic()
    first = times[0] if times else end
    scheduled = end if sequence.scheduled_time is None else sequence.scheduled_time
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Timings(
        queue_s=scheduled - sequence.arrival_time,
        ttft_s=first - sequence.arrival_time,
        per_token_s=(end - first) / len(gaps) if gaps else None,
        total_s=end - sequence.arrival_time,
        gaps_s=gaps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWaits:
    """Seconds that clients waited for first tokens (TTFT), and between two tokens (TBT)."""

    ttfts_s: tuple[float, ...] = ()
    gaps_s: tuple[float, ...] = ()


def waits_ended_at(now: float, sequences: Iterable[Sequence]) -> TokenWaits:
    """Seconds of waiting that tokens of time `now` ended, for sequences that got one."""
    ttfts, gaps = [], []
    for sequence in sequences:
        times = sequence.token_times
        if not times or times[-1] != now:
            continue
        if len(times) == 1:
            ttfts.append(now - sequence.arrival_time)
        else:
            gaps.append(now - times[-2])
    return TokenWaits(ttfts_s=tuple(ttfts), gaps_s=tuple(gaps))


@dataclass(slots=True)
class DurationHistogram:
    """Percentiles of any number of durations (seconds) within 1 %, in bounded memory.

    Buckets are powers of 1.02 from a microsecond up, kept sparsely.
    """

    count: int = 0
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float) -> None:
        bucket = math.floor(math.log(max(seconds, 1e-6) / 1e-6) / _LOG_RATIO)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1

    def percentile(self, percent: float) -> float | None:
        """Smallest duration that `percent` of all do not exceed; None while there are none."""
        rank = max(1, math.ceil(self.count * percent / 100))
        for bucket in sorted(self.buckets):
            rank -= self.buckets[bucket]
            if rank <= 0:
                return 1e-6 * math.exp((bucket + 0.5) * _LOG_RATIO)
        return None


_LOG_RATIO = math.log(1.02)


@dataclass(slots=True)
class StepMeter:
    """Tokens and seconds of prefill and of decode, counted apart.

    A step that computed prompt tokens counts as prefill with all its time; the first token of each
    request belongs to it and is not a decode token.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    def record(self, *, prompt_tokens: int, output_tokens: int, seconds: float) -> None:
        """Add one step: growth of the cumulative counts, and its seconds."""
        if prompt_tokens:
            self.prefill_tokens += prompt_tokens
            self.prefill_s += seconds
        else:
            self.decode_tokens += output_tokens
            self.decode_s += seconds

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second of prefill steps."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_rate(self) -> float:
        """Output tokens per second of decode steps, all requests together."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0
