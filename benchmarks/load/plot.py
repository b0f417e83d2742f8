"""Plot of clients' waiting times: distributions of TTFT, TBT, TPOT and response, and a timeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load.figures import timings_of_record
from benchmarks.load.replay import Replay
from sps2_mega.outputs import Timings

_Durations = Callable[[Timings], Sequence[float]]
_PANELS: tuple[tuple[str, str, _Durations], ...] = (
    ("TTFT, s", "ttft_s", lambda t: [t.ttft_s]),
    ("TBT, s", "tbt_s", lambda t: t.gaps_s),
    ("TPOT, s", "tpot_s", lambda t: [] if t.per_token_s is None else [t.per_token_s]),
    ("response time, s", "response_s", lambda t: [t.total_s]),
)


def plot(runs: dict[str, Replay], path: Path, *, title: str, limits: dict[str, float]) -> None:
    """Write a PNG with one line per run, and `limits` (seconds) in the panels of the same name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    for panel, (label, name, durations) in zip(axes.flat[:4], _PANELS, strict=True):
        for number, (run_name, run) in enumerate(runs.items()):
            timings = [timings_of_record(r) for r in run.records if r.error is None]
            _distribution(panel, [d for t in timings for d in durations(t)], run_name, number)
        if name in limits:
            panel.axvline(limits[name], color="black", linewidth=0.8, linestyle=":")
        panel.set_xlabel(label)
        panel.set_ylabel("share of them that took at most this")
        panel.grid(alpha=0.3)
    for number, run in enumerate(runs.values()):
        _over_time(axes.flat[4], run, number)
        _in_flight(axes.flat[5], run, number)
    axes.flat[4].set_ylabel("output tokens per s")
    axes.flat[5].set_ylabel("requests under way or waiting")
    for panel in axes.flat[4:]:
        panel.set_xlabel("s from the start")
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    axes.flat[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _distribution(panel: Any, seconds: Sequence[float], name: str, number: int) -> None:
    if not seconds:
        return
    ordered = np.sort(np.maximum(seconds, 1e-5))
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    panel.step(ordered, shares, where="post", color=f"C{number % 10}", label=name)
    panel.set_xscale("log")


def _over_time(panel: Any, run: Replay, number: int) -> None:
    times = np.sort([t - run.start for r in run.records for t in r.token_times])
    if not len(times):
        return
    counts, edges = np.histogram(times, bins=40, range=(0.0, max(run.duration_s, times[-1])))
    panel.stairs(counts / np.diff(edges), edges, color=f"C{number % 10}")


def _in_flight(panel: Any, run: Replay, number: int) -> None:
    changes = sorted(
        change for r in run.records for change in ((r.due - run.start, 1), (r.end - run.start, -1))
    )
    if not changes:
        return
    times, steps = zip(*changes, strict=True)
    panel.step(times, np.cumsum(steps), where="post", color=f"C{number % 10}")
