"""Pictures of results: answers by depth and length, and the frontier of accuracy against cost.

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


def frontier(result: dict[str, Any], length: int, path: Path) -> None:
    """Draw change of bits per byte, and exact answers, against bytes and FLOPs at one length.

    Settings that no other one beats in both are joined by a line.
    """
    tasks = [task for task in RETRIEVAL if task in result["tasks"]]
    rows = [("bits per byte, change from dense", _bits)]
    if tasks:
        rows.append(("exact answers, %", _found))
    figure, grid = plt.subplots(
        len(rows), 2, figsize=(13, 5 * len(rows)), squeeze=False, layout="constrained"
    )
    settings = {name: found[str(length)] for name, found in result["settings"].items()}
    for line, (label, value) in zip(grid, rows, strict=True):
        for axes, (cost, cost_label) in zip(line, _COSTS, strict=True):
            points = {
                name: (found["cost"][cost], value(found, tasks))
                for name, found in settings.items()
                # The attention of generated tokens does not change the loss.
                if value is _found or not found["sparse_decode"]
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
    """(cost, value) pairs that no other beats in one and equals in the other, by rising cost."""
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
        kind = "tab:red" if name.startswith("paper") else "tab:blue"
        axes.scatter(*point, s=40 if point in best else 14, color=kind, zorder=2)
    for together in _neighbours(points):
        place = points[together[0]]
        bold = any(points[name] in best for name in together)
        axes.annotate(
            "\n".join(together),
            place,
            fontsize=6,
            xytext=(4, -4),
            textcoords="offset points",
            verticalalignment="top",
            fontweight="bold" if bold else "normal",
        )
    axes.margins(x=0.12, y=0.18)
    axes.grid(alpha=0.3)


def _neighbours(points: dict[str, tuple[float, float]]) -> list[list[str]]:
    """Names by place, leftmost first; those whose labels would overlap are together."""
    (x0, y0), (x1, y1) = (
        tuple(choose(values) for values in zip(*points.values(), strict=True))
        for choose in (min, max)
    )
    width, height = 0.1 * ((x1 - x0) or 1.0), 0.03 * ((y1 - y0) or 1.0)
    groups: list[list[str]] = []
    for name in sorted(points, key=points.__getitem__):
        x, y = points[name]
        for group in groups:
            gx, gy = points[group[0]]
            if abs(x - gx) < width and abs(y - gy) < height:
                group.append(name)
                break
        else:
            groups.append([name])
    return groups
