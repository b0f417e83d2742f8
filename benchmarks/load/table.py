"""Figures of a replayed run as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SPREADS = (
    ("TTFT", "ttft_s"),
    ("TBT", "tbt_s"),
    ("TPOT", "tpot_s"),
    ("response time", "response_s"),
    ("sent late", "sent_late_s"),
)


def table(result: Mapping[str, Any]) -> str:
    """Table in milliseconds, with a dash where nothing was measured."""
    failed = sum(result["errors"].values())
    lines = [
        f"seed {result['seed']}: {result['answered']} of {result['requests']} answered in "
        f"{result['duration_s']:.1f} s, {failed} failed, {result['left_out']} left out as too long",
        f"{'ms':<14}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    for label, name in _SPREADS:
        spread = result[name]
        cells = ["-"] * 5 if spread is None else [f"{1e3 * value:.1f}" for value in spread.values()]
        lines.append(f"{label:<14}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(
        f"{result['requests_per_s']:.2f} requests/s, {result['prompt_tokens_per_s']:.0f} prompt "
        "and "
        f"{result['output_tokens_per_s']:.0f} output tokens/s, goodput "
        f"{result['goodput_per_s']:.2f} "
        f"requests/s ({100 * (result['good_share'] or 0):.0f} %)"
    )
    lines += [f"error: {kind}: {count}" for kind, count in sorted(result["errors"].items())]
    if result["shorter_than_asked"]:
        lines.append(f"{result['shorter_than_asked']} outputs were shorter than asked for")
    if result["client_cpu_share"] > _BUSY:
        lines.append(
            f"the client itself computed {100 * result['client_cpu_share']:.0f} % of the time: "
            "its numbers may be its own"
        )
    return "\n".join(lines)


_BUSY = 0.7
