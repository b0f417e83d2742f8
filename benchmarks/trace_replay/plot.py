"""Plot of paired replays: waiting times of every system, and the improvement over the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.trace_replay.figures import FIGURES, ratios


def plot(runs: Sequence[Mapping[str, Any]], baseline: str, path: Path, *, title: str) -> None:
    """Draw one row per link rate and one column per figure.

    Dots are slices, bars their means, numbers the median ratios.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = list(dict.fromkeys(run["rate"] for run in runs))
    systems = list(dict.fromkeys(run["system"] for run in runs))
    compared = ratios(runs, baseline)
    size = 4.5 * len(FIGURES), 3.2 * len(rates)
    figure, axes = plt.subplots(
        len(rates), len(FIGURES), figsize=size, squeeze=False, layout="constrained"
    )
    for row, rate in zip(axes, rates, strict=True):
        for panel, (name, label) in zip(row, FIGURES, strict=True):
            for place, system in enumerate(systems):
                seen = [
                    run["figures"][name]["mean"]
                    for run in runs
                    if (run["rate"], run["system"]) == (rate, system) and run["figures"].get(name)
                ]
                if not seen:
                    continue
                mean = sum(seen) / len(seen)
                panel.bar(place, mean, color=f"C{place}", alpha=0.6)
                panel.plot([place] * len(seen), seen, "k.")
                gain = compared.get(rate, {}).get(system, {}).get(f"{label} mean")
                if gain is not None:
                    panel.annotate(
                        f"{gain['median']:.2f}x", (place, mean), ha="center", va="bottom"
                    )
            panel.set_xticks(range(len(systems)), systems, rotation=15)
            panel.set_ylabel(f"{label}, mean, s")
            panel.set_title(f"link {rate}")
    figure.suptitle(f"{title}; measured")
    figure.savefig(path, dpi=100)
    plt.close(figure)
