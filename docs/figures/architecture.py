"""The way of a prompt through scheduler, worker, model and attention, as a drawing.

python docs/figures/architecture.py       writes docs/_static/architecture.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS / "figures"))

from drawing import Canvas  # noqa: E402

PICTURE = DOCS / "_static" / "architecture.svg"
WIDTH, HEIGHT = 760, 422

# Folder (below sps2_mega/), what it does; from the edge down.
RANK_0 = (
    ("serving", "HTTP API, batch files, Python"),
    ("engine", "requests, steps, start-up"),
    ("scheduler", "plans steps; pure Python"),
    ("text", "tokens to text and back"),
)
EVERY_RANK = (
    ("worker", "plan to tensors; sampling"),
    ("mcore", "Megatron's GPTModel"),
    ("attention", "who moves what, and when"),
)
FLOOR = (
    ("kernels", "Triton, torch"),
    ("kv_cache", "paged, spread over SP ranks"),
    ("comm", "NCCL, gloo"),
)
RANKS = 4


def draw() -> str:
    """SVG: rank 0's part on the left, what every rank runs on the right, one prompt below."""
    canvas = Canvas(WIDTH, HEIGHT, "Architecture of sps2_mega")
    _column(canvas, (20, 20), (226, 272), "rank 0", RANK_0)
    _column(canvas, (330, 20), (410, 272), "every rank", EVERY_RANK, width=186)
    for row, (folder, what) in enumerate(FLOOR):
        _module(canvas, (538, 52 + row * 58), 186, folder, what)
    _arrow(canvas, (246, 92), (330, 92))
    canvas.text((288, 82), "StepPlan", "code middle")
    canvas.text((288, 110), "one broadcast", "faint small middle")
    canvas.line((330, 186), (258, 186), "line-faint")
    _head(canvas, (246, 186), -1)
    canvas.text((288, 176), "tokens", "code middle")
    canvas.text((348, 254), "Plan on ints, act on tensors: who owns which token is", "faint small")
    canvas.text((348, 270), "decided by pure functions that every rank evaluates.", "faint small")
    _prompt(canvas, (20, 312))
    return canvas.svg()


def _column(
    canvas: Canvas,
    corner: tuple[int, int],
    size: tuple[int, int],
    title: str,
    modules: tuple[tuple[str, str], ...],
    width: int | None = None,
) -> None:
    canvas.box(corner, size, "fill-panel line-rule")
    canvas.text((corner[0] + 18, corner[1] + 22), title, "strong")
    for row, (folder, what) in enumerate(modules):
        place = (corner[0] + 14, corner[1] + 32 + row * 58)
        _module(canvas, place, width or size[0] - 28, folder, what)


def _module(canvas: Canvas, corner: tuple[int, int], width: int, folder: str, what: str) -> None:
    canvas.box(corner, (width, 48), "fill-card line-rule")
    canvas.text((corner[0] + 12, corner[1] + 20), f"{folder}/", "code strong accent")
    canvas.text((corner[0] + 12, corner[1] + 38), what, "faint small")


def _arrow(canvas: Canvas, start: tuple[int, int], end: tuple[int, int]) -> None:
    canvas.line(start, (end[0] - 10, end[1]), "line-faint")
    _head(canvas, end, 1)


def _head(canvas: Canvas, tip: tuple[int, int], direction: int) -> None:
    x, y = tip
    back = x - direction * 11
    canvas.path([(back, y - 5), (x, y), (back, y + 5)], "line-faint")


def _prompt(canvas: Canvas, corner: tuple[int, int]) -> None:
    """One prompt's tokens over four SP ranks, and what moves in prefill and in decode."""
    x, y = corner
    canvas.text((x, y + 6), "one long prompt", "strong")
    share = 180
    for rank in range(RANKS):
        left = x + rank * share
        canvas.box((left, y + 16), (share - 8, 30), "fill-panel line-rule")
        canvas.text((left + 12, y + 36), f"SP rank {rank}: tokens, K and V", "small")
    canvas.text((x, y + 72), "prefill", "strong teal")
    canvas.text(
        (x + 62, y + 72),
        "keys, values or queries move while attention computes; with CSA one far key in d",
        "small",
    )
    canvas.text((x, y + 94), "decode", "strong blue")
    canvas.text(
        (x + 62, y + 94),
        "K and V stay; the new token's query visits every rank, and (out, lse) are merged",
        "small",
    )


if __name__ == "__main__":
    PICTURE.write_text(draw())
