"""Results as a markdown table and as a picture: depth by length for each task and setting.

Decides how numbers are shown, measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """One table per length; tasks show the share answered exactly."""
    tasks = result["tasks"]
    lines = []
    for length in map(str, result["lengths"]):
        some = next(iter(result["settings"].values()))[length]
        lines += [
            f"### {length} tokens",
            "",
            f"{some['text']['num_windows']} texts, {_num_probes(some, tasks)} probes per task.",
            "",
            "| setting | attention FLOPs | keys moved | bits per byte | change | KL from dense | "
            + " | ".join(tasks)
            + " |",
            "|---" * (6 + len(tasks)) + "|",
        ]
        for name, by_length in result["settings"].items():
            lines.append(_row(name, by_length[length], tasks))
        lines.append("")
    return "\n".join(lines)


def heatmap(result: dict[str, Any], path: Path) -> None:
    """Share of exact answers for each depth (down) and length (across). Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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
        axes.set_title(name, fontsize=8)
    figure.suptitle(f"{result['model']}: % answered exactly, depth by prompt length", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _row(name: str, measured: dict[str, Any], tasks: list[str]) -> str:
    text, cost = measured["text"], measured["cost"]
    change = "" if name == "dense" else f"{text['delta_bits_per_byte']:+.4f}"
    if change and text["delta_standard_error"] is not None:
        change += f" ± {text['delta_standard_error']:.4f}"
    kl = text["kl_from_dense"]
    cells = [
        f"`{name}`",
        f"{cost['flops']:.2f}",
        f"{cost['keys_moved']:.2f}",
        f"{text['bits_per_byte']:.4f}",
        change,
        "" if kl is None or name == "dense" else f"{kl:.4f}",
        *(f"{100 * measured['tasks'][task]['exact']:.0f} %" for task in tasks),
    ]
    return "| " + " | ".join(cells) + " |"


def _num_probes(measured: dict[str, Any], tasks: list[str]) -> int:
    return measured["tasks"][tasks[0]]["num_probes"] if tasks else 0
