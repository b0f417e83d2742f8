"""The loss curve as a picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from benchmarks.train.loop import Record


def draw_curve(records: list[Record], path: Path) -> None:
    """Draw bits per byte of code and share of found first digits over steps.

    Vertical lines mark where the length grows.

    Raises:
        ImportError: matplotlib is not installed (extra `bench`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [record["step"] for record in records]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    bits = figure.add_subplot()
    bits.plot(steps, [r["code_bits_per_byte"] for r in records], color="tab:blue")
    bits.set_xlabel("step")
    bits.set_ylabel("bits per byte of code (training batches)", color="tab:blue")
    found = bits.twinx()
    found.plot(steps, [r["first_digit_accuracy"] for r in records], color="tab:orange")
    found.set_ylabel("first digits of answers found", color="tab:orange")
    found.set_ylim(0, 1.02)
    for before, after in pairwise(records):
        if before["length"] != after["length"]:
            bits.axvline(before["step"], color="grey", linewidth=0.8)
            bits.annotate(
                f" {after['length']:.0f}",
                (before["step"], 0.97),
                xycoords=("data", "axes fraction"),
                color="grey",
            )
    figure.savefig(path, dpi=120)
