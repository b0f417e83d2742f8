"""Figures of a replayed workload, as its clients saw them.

TTFT, TBT and TPOT are defined in `sps2_mega.metrics`, with a request arriving when it was due. A
request is good if its TTFT and the 99th percentile of its gaps keep their limits. Requests that
failed are counted by kind and have no latencies.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.load.client import Record
from benchmarks.load.replay import Replay
from sps2_mega.metrics import timings_of
from sps2_mega.outputs import Timings
from sps2_mega.simulator.figures import Limits
from sps2_mega.types import SamplingParams
from sps2_mega.types import Sequence as TokenSequence


def timings_of_record(record: Record) -> Timings:
    """Timings of an answered request; the end of a stream without any text is its first token."""
    sequence = TokenSequence(
        seq_id=0,
        prompt_token_ids=[],
        params=SamplingParams(),
        seed=0,
        max_tokens=record.request.output_len,
        arrival_time=record.due,
        token_times=record.token_times or [record.end],
        scheduled_time=record.sent,
    )
    timings = timings_of(sequence)
    if record.num_tokens < 2 or timings.per_token_s is None:
        return timings
    # Tokens without text of their own come with the next one: the mean gap is over all of them.
    span = sequence.token_times[-1] - sequence.token_times[0]
    return dataclasses.replace(timings, per_token_s=span / (record.num_tokens - 1))


def figures(run: Replay, limits: Limits) -> dict[str, Any]:
    """Plain numbers for JSON; durations in seconds, None without a measurement."""
    answered = [record for record in run.records if record.error is None]
    timings = [timings_of_record(record) for record in answered]
    duration = run.duration_s or 1.0
    good = sum(_is_good(timing, limits) for timing in timings)
    events = sum(len(record.token_times) for record in answered)
    outputs = sum(record.num_tokens for record in answered)
    return {
        "requests": len(run.records),
        "answered": len(answered),
        "errors": dict(Counter(record.error for record in run.records if record.error)),
        "duration_s": run.duration_s,
        "requests_per_s": len(answered) / duration,
        "prompt_tokens_per_s": sum(r.prompt_tokens or 0 for r in answered) / duration,
        "output_tokens_per_s": outputs / duration,
        "ttft_s": spread([timing.ttft_s for timing in timings]),
        "tbt_s": spread([gap for timing in timings for gap in timing.gaps_s]),
        "tpot_s": spread([t.per_token_s for t in timings if t.per_token_s is not None]),
        "response_s": spread([timing.total_s for timing in timings]),
        "goodput_per_s": good / duration,
        "good_share": good / len(run.records) if run.records else None,
        "prompt_tokens": sum(r.prompt_tokens or 0 for r in answered),
        "cached_tokens": sum(r.cached_tokens or 0 for r in answered),
        "output_tokens": outputs,
        "tokens_per_event": outputs / events if events else None,
        "shorter_than_asked": sum(r.num_tokens < r.request.output_len for r in answered),
        "sent_late_s": spread([record.sent - record.due for record in run.records]),
        "most_in_flight": run.most_in_flight,
        "client_cpu_share": run.client_cpu_s / duration,
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    array = np.asarray(values)
    p50, p90, p99 = map(float, np.percentile(array, [50, 90, 99]))
    return {
        "mean": float(array.mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": float(array.max()),
    }


def _is_good(timing: Timings, limits: Limits) -> bool:
    late = float(np.percentile(timing.gaps_s, 99)) if timing.gaps_s else 0.0
    return timing.ttft_s <= limits.ttft_s and late <= limits.tbt_s
