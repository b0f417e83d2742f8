"""Figures of a simulated run: waiting times of users, yield of the cluster, and time by cost term.

`metrics.timings_of` defines TTFT, TBT and TPOT of a request, `metrics.StepMeter` the rates of
prefill and decode, here summed over engines. A request is good when its TTFT and the 99th
percentile of its gaps keep their limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sps2_mega.outputs import Timings
from sps2_mega.simulator.simulator import SimulatedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Service level objectives, in seconds."""

    ttft_s: float = 5.0
    tbt_s: float = 0.1


def figures(run: SimulatedRun, limits: Limits) -> dict[str, Any]:
    """Plain numbers, for JSON; durations in seconds, None where there is nothing to measure."""
    timings = run.timings
    gaps = [gap for timing in timings for gap in timing.gaps_s]
    outputs = sum(len(timing.gaps_s) + 1 for timing in timings)
    good = sum(_is_good(timing, limits) for timing in timings)
    duration = run.duration_s or 1.0
    total = sum(run.terms.values()) or 1.0
    return {
        "requests": len(timings),
        "refused": run.refused,
        "duration_s": run.duration_s,
        "ttft_s": _spread([timing.ttft_s for timing in timings]),
        "tbt_s": _spread(gaps),
        "tpot_s": _spread([t.per_token_s for t in timings if t.per_token_s is not None]),
        "response_s": _spread([timing.total_s for timing in timings]),
        "queue_s": _spread([timing.queue_s for timing in timings]),
        "prompt_tokens_per_s": sum(run.prompt_lens) / duration,
        "output_tokens_per_s": outputs / duration,
        "prefill_rate": sum(meter.prefill_rate for meter in run.meters),
        "decode_rate": sum(meter.decode_rate for meter in run.meters),
        "goodput": good / duration,
        "good_share": good / (len(timings) + run.refused) if timings or run.refused else None,
        "busy_share": run.busy_share,
        "peak_kv_usage": run.peak_kv_usage,
        "preemptions": run.num_preemptions,
        "cached_tokens": run.cached_tokens,
        "time_in": _time_in(timings),
        "step_terms": {name: seconds / total for name, seconds in sorted(run.terms.items())},
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    array = np.asarray(values)
    p50, p90, p99 = np.percentile(array, [50, 90, 99])
    return {"mean": float(array.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def _is_good(timing: Timings, limits: Limits) -> bool:
    late = float(np.percentile(timing.gaps_s, 99)) if timing.gaps_s else 0.0
    return timing.ttft_s <= limits.ttft_s and late <= limits.tbt_s


def _time_in(timings: Sequence[Timings]) -> dict[str, float]:
    """Mean seconds of a request in the queue, in prefill, and after its first token."""
    count = max(1, len(timings))
    return {
        "queue": sum(t.queue_s for t in timings) / count,
        "prefill": sum(t.ttft_s - t.queue_s for t in timings) / count,
        "decode": sum(t.total_s - t.ttft_s for t in timings) / count,
    }
