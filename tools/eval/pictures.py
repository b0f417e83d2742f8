"""Results as pictures: answers by depth and length, and the frontier of accuracy against cost.

Decides what is drawn and which settings are on the frontier, measures nothing. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RETRIEVAL = ("passkey", "key_value", "reference", "copy", "second_turn")
_COSTS = (("bytes_moved", "bytes moved, dense = 1"), ("flops", "attention FLOPs, dense = 1"))


def heatmap(result: dict[str, Any], path: Path) -> None:
    """Share of exact answers for each depth (down) and length (across)."""
    settings, tasks = list(result["settings"]), result["tasks"]
    lengths, depths = result["lengths"], result["depths"]
    figure, grid = plt.subplots(
        len(tasks),
        len(settings),
        figsize=(1.0 + 1.35 * len(settings), 0.8 + 1.75 * len(tasks)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for row, task in zip(grid, tasks, strict=True):
        for axes, name in zip(row, settings, strict=True):
            cells = [
                [
                    result["settings"][name][str(length)]["tasks"][task]["depths"][str(depth)]
                    for length in lengths
                ]
                for depth in depths
            ]
            axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for y, shares in enumerate(cells):
                for x, share in enumerate(shares):
                    axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
            axes.set_xticks(range(len(lengths)), lengths, fontsize=7)
            axes.set_yticks(range(len(depths)), depths, fontsize=7)
        row[0].set_ylabel(task)
    for axes, name in zip(grid[0], settings, strict=True):
        axes.set_title(name.replace("-", "\n", 1) if len(name) > 14 else name, fontsize=7)
    figure.suptitle(f"{result['model']}: % answered exactly, depth by prompt length", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def frontier(result: dict[str, Any], path: Path) -> None:
    """At the longest length: change of bits per byte, and exact answers, against bytes and FLOPs. Settings that no
    other one beats in both are joined by a line."""
    length = str(max(result["lengths"]))
    tasks = [task for task in RETRIEVAL if task in result["tasks"]]
    rows = [("bits per byte, change from dense", _bits)] + ([("exact answers, %", _found)] if tasks else [])  # fmt: skip
    figure, grid = plt.subplots(
        len(rows), 2, figsize=(13, 5 * len(rows)), squeeze=False, layout="constrained"
    )
    settings = {name: found[length] for name, found in result["settings"].items()}
    for line, (label, value) in zip(grid, rows, strict=True):
        for axes, (cost, cost_label) in zip(line, _COSTS, strict=True):
            points = {
                name: (found["cost"][cost], value(found, tasks)) for name, found in settings.items()
            }
            _draw(axes, points, higher_is_better=value is _found)
            axes.set_xlabel(f"{cost_label} ({length} tokens)")
            axes.set_ylabel(label)
    figure.suptitle(f"{result['model']}: what is lost for what is saved, {length} tokens")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def pareto(
    points: dict[str, tuple[float, float]], *, higher_is_better: bool
) -> list[tuple[float, float]]:
    """The (cost, value) pairs that no other pair beats in one and equals in the other, by rising cost."""
    sign = -1.0 if higher_is_better else 1.0
    best: list[tuple[float, float]] = []
    for cost, value in sorted(set(points.values()), key=lambda p: (p[0], sign * p[1])):
        if not best or sign * value < sign * best[-1][1]:
            best.append((cost, value))
    return best


def _bits(measured: dict[str, Any], tasks: Sequence[str]) -> float:
    return float(measured["text"]["delta_bits_per_byte"])


def _found(measured: dict[str, Any], tasks: Sequence[str]) -> float:
    return 100 * sum(measured["tasks"][task]["exact"] for task in tasks) / len(tasks)


def _draw(axes: Any, points: dict[str, tuple[float, float]], *, higher_is_better: bool) -> None:
    best = pareto(points, higher_is_better=higher_is_better)
    axes.plot(*zip(*best, strict=True), color="0.6", zorder=1, drawstyle="steps-post")
    for name, point in points.items():
        on_it = point in best
        kind = "tab:red" if name.startswith("paper") else "tab:blue"
        axes.scatter(*point, s=40 if on_it else 18, color=kind, zorder=2)
        axes.annotate(
            name, point, fontsize=7, xytext=(4, 3), textcoords="offset points",
            fontweight="bold" if on_it else "normal",
        )  # fmt: skip
    axes.grid(alpha=0.3)
