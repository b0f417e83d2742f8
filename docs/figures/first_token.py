"""First-token time against link rate, drawn from docs/results/cluster.json.

python docs/figures/first_token.py        writes docs/_static/first-token.svg
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS / "figures"))

from drawing import Canvas  # noqa: E402

RESULT = DOCS / "results" / "cluster.json"
PICTURE = DOCS / "_static" / "first-token.svg"
SHAPE, TOKENS = "gqa", 8192

# Curve of the result file -> label, colour class.
SYSTEMS = {
    "tp-chunked-2048": ("TP, chunked prefill", "grey"),
    "ulysses": ("SP, exact (Ulysses)", "blue"),
    "ulysses-pipelined": ("SP, exact, pipelined", "teal"),
    "ring": ("SP, exact (ring)", "purple"),
    "csa-pipelined": ("SP, CSA 1,4, pipelined", "accent"),
}
WIDTH, HEIGHT = 720, 356
LEFT, RIGHT, TOP, BOTTOM = 62, 500, 64, 300
SECONDS = (0.8, 14.0)
TICKS_S = (1, 2, 4, 8)
LABEL_GAP = 17


def draw() -> str:
    """SVG of the run with 4:1 heads and 8192 tokens; medians of its repeats."""
    run = next(
        run
        for run in json.loads(RESULT.read_text())["runs"]
        if (run["shape"], run["tokens"]) == (SHAPE, TOKENS)
    )
    curves = {
        name: {bits_per_s(rate): point["ttft_s"] for rate, point in run["curves"][name].items()}
        for name in SYSTEMS
    }
    rates = sorted(next(iter(curves.values())), reverse=True)
    canvas = Canvas(WIDTH, HEIGHT, f"Time to the first token of {TOKENS} tokens against link rate")
    canvas.text((20, 28), f"Time to the first token of a prompt of {TOKENS:,} tokens", "head")
    canvas.text(
        (20, 47),
        "two emulated nodes of one CPU core each, small random Llama; both axes logarithmic",
        "faint small",
    )
    _axes(canvas, rates, run["balanced_rate"])
    for name, by_rate in curves.items():
        points = [(_x(rate, rates), _y(by_rate[rate])) for rate in rates]
        colour = SYSTEMS[name][1]
        canvas.path(points, f"line-{colour}")
        for point in points:
            canvas.dot(point, f"fill-{colour}")
    _labels(canvas, {name: by_rate[rates[-1]] for name, by_rate in curves.items()})
    return canvas.svg()


def bits_per_s(rate: str) -> float:
    """Bits per second of `10gbit` or `60mbit`."""
    return float(rate[:-4]) * {"gbit": 1e9, "mbit": 1e6}[rate[-4:]]


def _axes(canvas: Canvas, rates: list[float], balance: str) -> None:
    for seconds in TICKS_S:
        canvas.line((LEFT, _y(seconds)), (RIGHT, _y(seconds)), "line-rule")
        canvas.text((LEFT - 10, _y(seconds) + 4), f"{seconds} s", "faint small end")
    for rate in rates:
        name = f"{rate / 1e9:g} Gbit/s" if rate >= 1e9 else f"{rate / 1e6:g} Mbit/s"
        # The two slowest rates are an octave apart: their labels lean away from each other.
        shift = {rates[-1]: 14, rates[-2]: -14}.get(rate, 0)
        canvas.text((_x(rate, rates) + shift, BOTTOM + 20), name, "faint small middle")
    place = _x(bits_per_s(balance), rates)
    canvas.line((place, TOP), (place, BOTTOM), "line-faint dashed")
    canvas.text(
        (place, BOTTOM + 40), "SP Ulysses sends as long as it computes", "faint small middle"
    )
    canvas.text((LEFT, BOTTOM + 40), "link rate, slower to the right", "faint small")


def _labels(canvas: Canvas, last: dict[str, float]) -> None:
    """Name and last value of each curve beside its end, pushed apart where they would overlap."""
    lowest = math.inf
    for name in sorted(last, key=lambda name: last[name]):
        place = min(_y(last[name]) + 4, lowest - LABEL_GAP)
        lowest = place
        label, colour = SYSTEMS[name]
        canvas.text((RIGHT + 12, place), f"{last[name]:.1f} s  {label}", f"{colour} small strong")


def _x(rate: float, rates: list[float]) -> float:
    share = math.log(rates[0] / rate) / math.log(rates[0] / rates[-1])
    return LEFT + 22 + share * (RIGHT - LEFT - 30)


def _y(seconds: float) -> float:
    low, high = SECONDS
    return BOTTOM - math.log(seconds / low) / math.log(high / low) * (BOTTOM - TOP)


if __name__ == "__main__":
    PICTURE.write_text(draw())
