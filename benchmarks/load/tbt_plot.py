"""Plot of time between tokens over time, prefills shaded, and its distribution, per system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load.tbt_run import Watched


def plot(runs: dict[str, list[Watched]], result: dict[str, Any], path: Path) -> None:
    """Write a PNG of the first round over time and of all rounds' distributions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(runs),
        2,
        figsize=(13, 2.4 * len(runs) + 0.6),
        layout="constrained",
        squeeze=False,
        width_ratios=[3, 2],
        sharey="col",
    )
    for row, (name, each) in zip(axes, runs.items(), strict=True):
        _over_time(row[0], each[0])
        _distributions(row[1], each)
        best = " (best of its kind)" if name == result["best_sarathi"] else ""
        ratio = result["systems"][name].get("p99_over_quiet_p50", float("nan"))
        ttft = result["systems"][name]["ttft_s"]["mean"]
        row[0].set_title(
            f"{name}{best}: disturbed p99 = {ratio:.1f} x quiet median, TTFT {ttft:.2f} s",
            fontsize=10,
        )
    axes[-1][0].set_xlabel("s")
    axes[-1][1].set_xlabel("time between tokens, ms")
    trace = result["trace"]
    figure.suptitle(
        f"{trace['decodes']} running requests while prompts of {trace['prompt_len']} tokens are "
        "prefilled (shaded)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _over_time(panel: Any, run: Watched) -> None:
    for due, over in run.prefills:
        panel.axvspan(due, over, color="C1", alpha=0.25, linewidth=0)
    ends = [end for _, end in run.gaps]
    panel.plot(ends, [1e3 * (end - begin) for begin, end in run.gaps], ".", markersize=2)
    panel.set_yscale("log")
    panel.set_ylabel("TBT, ms")
    panel.grid(alpha=0.3)


def _distributions(panel: Any, runs: list[Watched]) -> None:
    parts = [run.parted() for run in runs]
    for place, (label, color) in enumerate((("quiet", "C0"), ("disturbed", "C1"))):
        gaps = np.sort([1e3 * gap for part in parts for gap in part[place]])
        if len(gaps):
            shares = np.arange(1, len(gaps) + 1) / len(gaps)
            panel.step(gaps, shares, where="post", color=color, label=label)
    panel.set_xscale("log")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
