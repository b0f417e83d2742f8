"""Figures of paired replays: improvement of a system over the baseline, per slice of the trace.

Pure numbers; a ratio above 1 is better than the baseline. Slices are the pairs: every system got
the same requests.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = (("ttft_s", "TTFT"), ("tbt_s", "TBT"), ("response_s", "response time"))
KEYS = ("mean", "p50", "p99")
_COLUMNS = (("ttft_s", "mean"), ("tbt_s", "mean"), ("tbt_s", "p99"), ("response_s", "mean"))


def ratios(
    runs: Sequence[Mapping[str, Any]], baseline: str
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{rate: {system: {"TTFT mean": {median, least, most}}}}.

    `runs` hold rate, slice, system and figures.
    """
    by_pair = {(run["rate"], run["slice"], run["system"]): run["figures"] for run in runs}
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for rate in _in_order(runs, "rate"):
        for system in _in_order(runs, "system"):
            if system == baseline:
                continue
            for figure, label in FIGURES:
                for key in KEYS:
                    seen = []
                    for number in _in_order(runs, "slice"):
                        ours = by_pair.get((rate, number, system))
                        base = by_pair.get((rate, number, baseline))
                        if ours and base and ours.get(figure) and base.get(figure):
                            seen.append(base[figure][key] / ours[figure][key])
                    if seen:
                        found.setdefault(rate, {}).setdefault(system, {})[f"{label} {key}"] = {
                            "median": statistics.median(seen),
                            "least": min(seen),
                            "most": max(seen),
                        }
    return found


def table(runs: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Markdown: means over slices of every system, and the paired ratios."""
    lines = [
        "| link | system | TTFT mean | TBT mean | p99 | response mean | answered | TTFT | TBT | "
        "response "
        "(times better, least to most) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    compared = ratios(runs, baseline)
    for rate in _in_order(runs, "rate"):
        for system in _in_order(runs, "system"):
            mine = [r["figures"] for r in runs if (r["rate"], r["system"]) == (rate, system)]
            if not mine:
                continue
            cells = [rate, system]
            for figure, key in _COLUMNS:
                values = [found[figure][key] for found in mine if found.get(figure)]
                cells.append(_seconds(statistics.fmean(values)) if values else "")
            answered, asked = (sum(f[k] for f in mine) for k in ("answered", "requests"))
            cells.append(f"{answered} of {asked}")
            own = compared.get(rate, {}).get(system, {})
            for _, label in FIGURES:
                gain = own.get(f"{label} mean")
                cells.append(
                    ""
                    if gain is None
                    else f"{gain['median']:.2f}x ({gain['least']:.2f}-{gain['most']:.2f})"
                )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _in_order(runs: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(run[key] for run in runs))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
