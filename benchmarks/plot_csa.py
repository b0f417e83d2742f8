"""Picture of a CSA pattern for docs/csa.png: levels, degrees and spans, from its own definition.

    python benchmarks/plot_csa.py [FILE]        (needs matplotlib)

The upper part shows what one KV head sees, a cell per (query, key) pair; the lower part one query
and all KV heads, with the keys that each keeps. The numbers are small so that single keys can be
made out; nothing else is simplified.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TOKENS, KV_HEADS, LAYER = 96, 4, 0
DEGREES, SPANS = (1, 2, 4), (16, 48)
SINKS, HALO, TAIL = 2, 4, 4
QUERY = 87

HIDDEN, FUTURE = "#ffffff", "#e9e9e9"
KINDS = {  # in the order of the legend
    f"level 0: own cell of {SPANS[0]}, all keys": "#1f4e79",
    f"level 1: cell of {SPANS[1]}, 1 key in {DEGREES[1]}": "#2e8b7a",
    f"level 2: everything before, 1 in {DEGREES[2]}": "#8fbf4d",
    f"halo: {HALO} keys before the own cell": "#e08a1e",
    f"sinks: the first {SINKS} tokens": "#b5382a",
    f"tail: the last {TAIL} queries see all": "#7b4fa3",
}


def kind_of(pattern: Any, i: int, j: int, kv_head: int) -> str:
    """Colour of a pair."""
    level_0, level_1, level_2, halo, sinks, tail = KINDS.values()
    if j > i:
        return FUTURE
    if not pattern.sees(i, j, kv_head=kv_head, layer=LAYER, prompt_len=TOKENS):
        return HIDDEN
    if i >= TOKENS - TAIL:
        return tail
    if pattern.level(i, j) == 0:
        return level_0
    if pattern.always_seen(i, j):
        return sinks if j < SINKS else halo
    return (level_0, level_1, level_2)[pattern.level(i, j)]


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    from sps2_mega.attention.csa.pattern import CSAPattern

    pattern = CSAPattern(
        degrees=DEGREES, spans=SPANS, sinks=SINKS, halo=HALO, tail=TAIL, sample_queries=False
    )
    figure, (matrix, heads) = plt.subplots(
        2, 1, figsize=(8.6, 11.2), height_ratios=[7.2, 1.25], layout="constrained"
    )
    rows = [[kind_of(pattern, i, j, kv_head=1) for j in range(TOKENS)] for i in range(TOKENS)]
    _cells(matrix, rows)
    for edge in range(0, TOKENS + 1, SPANS[0]):
        width = 1.4 if edge % SPANS[1] == 0 else 0.5
        matrix.axhline(edge - 0.5, color="black", linewidth=width)
        matrix.axvline(edge - 0.5, color="black", linewidth=width)
    matrix.set_title(f"What KV head 1 of layer {LAYER} sees: spans {SPANS}, degrees {DEGREES}")
    matrix.set_xlabel("key position j")
    matrix.set_ylabel("query position i")
    for axis in (matrix.xaxis, matrix.yaxis):
        axis.set_ticks(range(0, TOKENS, SPANS[0]))
    legend = [Patch(color=colour, label=name) for name, colour in KINDS.items()]
    matrix.legend(handles=legend, loc="upper right", fontsize=9.5, framealpha=1.0)

    _cells(heads, [[kind_of(pattern, QUERY, j, g) for j in range(TOKENS)] for g in range(KV_HEADS)])
    for g in range(1, KV_HEADS):
        heads.axhline(g - 0.5, color="white", linewidth=2)
    heads.set_aspect("auto")
    heads.set_title(
        f"Query {QUERY}: each KV head keeps another residue, together they keep all keys"
    )
    heads.set_xlabel("key position j")
    heads.set_ylabel("KV head")
    heads.set_xticks(range(0, TOKENS, SPANS[0]))
    heads.set_yticks(range(KV_HEADS))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _cells(axes: Any, colours: list[list[str]]) -> None:
    from matplotlib.colors import to_rgb

    axes.imshow([[to_rgb(colour) for colour in row] for row in colours], interpolation="nearest")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "docs" / "csa.png")
    path = parser.parse_args().file
    try:
        draw(path)
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: install matplotlib")
    print("written:", path)


if __name__ == "__main__":
    main()
