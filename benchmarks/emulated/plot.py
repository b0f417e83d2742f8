"""Plot of time to first token and exposed communication against link rate, per model and length."""

from __future__ import annotations

from pathlib import Path

from benchmarks.emulated.figures import middle_of
from benchmarks.emulated.nodes import rate_name
from benchmarks.emulated.result import Run

_FREE = 4e10  # where the free link is drawn, bits per second


def plot(runs: list[Run], path: Path) -> None:
    """Write a PNG.

    Exposed communication of systems that do not record it is their time above that at the fastest
    link (dashed).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(runs), figsize=(5.4 * len(runs) + 2.2, 8), layout="constrained", squeeze=False
    )
    for column, run in enumerate(runs):
        times, waits = axes[0][column], axes[1][column]
        measured = sorted({rate for by in run.samples.values() for rate in by}, key=_place)
        ticks = [_place(rate) for rate in measured]
        for number, system in enumerate(run.systems):
            by_rate = run.samples[system.name]
            rates = sorted(by_rate, key=_place)
            places = [_place(rate) for rate in rates]
            middles = [middle_of(by_rate[rate]) for rate in rates]
            look = {"color": f"C{number}", "marker": "o", "markersize": 4}
            ttft = [middle.ttft_s for middle in middles]
            times.plot(places, ttft, label=system.label, **look)
            if system.layout == "one":
                continue
            recorded = any(middle.total_comm_s for middle in middles)
            exposed = (
                [middle.exposed_comm_s for middle in middles]
                if recorded
                else [max(0.0, seconds - ttft[-1]) for seconds in ttft]
            )
            waits.plot(places, exposed, linestyle="-" if recorded else "--", **look)
        times.set_title(f"{run.shape.name}, {run.tokens} tokens")
        times.set_ylabel("time to first token, s")
        waits.set_ylabel("exposed communication, s")
        for panel in (times, waits):
            panel.set_xscale("log")
            panel.set_xlabel("link rate, bit/s (dotted: communication = computation)")
            panel.set_xticks(ticks, [rate_name(rate).removesuffix("bit") for rate in measured])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if run.balance is not None:
                panel.axvline(run.balance, color="black", linewidth=0.8, linestyle=":")
        times.set_yscale("log")
        times.yaxis.set_major_formatter("{x:g}")
        waits.set_yscale("symlog", linthresh=0.1)
        waits.set_ylim(bottom=0)
        waits.yaxis.set_major_formatter("{x:g}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _place(rate: float | None) -> float:
    return _FREE if rate is None else rate
