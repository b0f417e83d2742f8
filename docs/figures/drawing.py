"""Minimal SVG canvas: lines, boxes, paths and text on a card that is readable in light and dark.

Colours are CSS classes in the file itself, switched by `prefers-color-scheme`, so a picture needs
no style sheet of the page around it.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"

# Class -> colour in light and in dark mode. The card is opaque: it reads well on either page.
PALETTE = {
    "card": ("#ffffff", "#15181d"),
    "ink": ("#1f2328", "#e6e9ee"),
    "faint": ("#6a737d", "#9aa4b0"),
    "rule": ("#d8dee4", "#343b44"),
    "panel": ("#f3f5f8", "#1f242c"),
    "accent": ("#c2410c", "#fb923c"),
    "blue": ("#1d4ed8", "#7aa2ff"),
    "teal": ("#0f766e", "#4fd1c5"),
    "purple": ("#7c3aed", "#b794ff"),
    "grey": ("#64707d", "#a3adb8"),
}


class Canvas:
    """One picture of `width` x `height` pixels; `title` is read out by screen readers."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def line(self, start: tuple[float, float], end: tuple[float, float], look: str) -> None:
        """`look` is a space-separated list of CSS classes."""
        (x1, y1), (x2, y2) = start, end
        self._parts.append(
            f'<line class="{look}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def path(self, points: list[tuple[float, float]], look: str) -> None:
        """Open polyline through `points`."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline class="{look}" points="{places}"/>')

    def dot(self, centre: tuple[float, float], look: str) -> None:
        self._parts.append(
            f'<circle class="{look}" cx="{centre[0]:.1f}" cy="{centre[1]:.1f}" r="3.5"/>'
        )

    def box(self, corner: tuple[float, float], size: tuple[float, float], look: str) -> None:
        (x, y), (width, height) = corner, size
        self._parts.append(
            f'<rect class="{look}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" rx="6"/>'
        )

    def text(self, place: tuple[float, float], words: str, look: str = "ink") -> None:
        self._parts.append(
            f'<text class="{look}" x="{place[0]:.1f}" y="{place[1]:.1f}">{escape(words)}</text>'
        )

    def svg(self) -> str:
        """The whole file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}"'
                f' width="{self.width}" height="{self.height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{_style()}</style>",
                f'<rect class="fill-card" width="{self.width}" height="{self.height}" rx="8"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


def _style() -> str:
    rules = [
        f"text{{font:13px {FONT};fill:var(--ink)}}",
        "line,polyline,rect{stroke-width:1.2;fill:none}",
        "polyline{stroke-width:2.4;stroke-linejoin:round}",
        ".small{font-size:11.5px}.strong{font-weight:600}.head{font-size:15px;font-weight:600}",
        ".middle{text-anchor:middle}.end{text-anchor:end}.dashed{stroke-dasharray:4 4}",
        ".code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px}",
    ]
    for name in PALETTE:
        rules.append(
            f"text.{name}{{fill:var(--{name})}}.fill-{name}{{fill:var(--{name})}}"
            f".line-{name}{{stroke:var(--{name})}}"
        )
    light = ";".join(f"--{name}:{light}" for name, (light, _) in PALETTE.items())
    dark = ";".join(f"--{name}:{dark}" for name, (_, dark) in PALETTE.items())
    variables = f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"
    return variables + "".join(rules)
