"""Pictures of a simulated comparison: waiting times, ratios to the baseline, shares of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sps2_mega.simulator.comparison.report import CLAIMS, OURS, gains
from sps2_mega.simulator.comparison.setting import Outcome

_CURVES = (("ttft_s", "TTFT"), ("tbt_s", "TBT"), ("response_s", "response time"))


def draw(setting: str, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a PNG of six panels with `setting` as its title; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(17, 9), layout="constrained")
    names = list(dict.fromkeys(outcome.system.name for outcome in outcomes))
    rates_seen = sorted({outcome.rate for outcome in outcomes})
    colors = {name: f"C{number % 10}" for number, name in enumerate(names)}
    for panel, (figure_name, label) in zip(axes[0], _CURVES, strict=True):
        for name in names:
            rows = [o for o in outcomes if o.system.name == name and o.figures[figure_name]]
            rates = [row.rate for row in rows]
            for key, style in (("mean", "-"), ("p99", ":")):
                values = [row.figures[figure_name][key] for row in rows]
                panel.plot(
                    rates, values, style, marker="o", markersize=3, color=colors[name],
                    label=name if key == "mean" else None,
                )  # fmt: skip
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(rates_seen, [f"{rate:g}" for rate in rates_seen])
        panel.minorticks_off()
        panel.set_xlabel("rate, times the trace's")
        panel.set_ylabel(f"{label}, s (dotted: p99)")
        panel.grid(alpha=0.3)
    _ratios(axes[1][0], outcomes, rates_seen[-1])
    _requests(axes[1][1], [o for o in outcomes if o.rate == rates_seen[-1]])
    _steps(axes[1][2], [o for o in outcomes if o.rate == rates_seen[-1]])
    figure.suptitle(f"{setting}; simulated")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _ratios(panel: Any, outcomes: Sequence[Outcome], rate: float) -> None:
    """Gains over the baseline beside the paper's claims."""
    present = [name for name in OURS if any(o.system.name == name for o in outcomes)]
    for place, name in enumerate(present):
        found = gains(outcomes, rate, name)
        bars = [found[claim.name] or 0.0 for claim in CLAIMS]
        panel.bar([i + place * 0.2 for i in range(len(bars))], bars, width=0.18, label=name)
    panel.plot(
        [i + 0.2 for i in range(len(CLAIMS))],
        [claim.ratio for claim in CLAIMS],
        "k_",
        markersize=24,
        label="paper",
    )
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set_xticks([i + 0.2 for i in range(len(CLAIMS))], [claim.name for claim in CLAIMS])
    panel.tick_params(axis="x", labelrotation=20)
    panel.set_ylabel(f"times better than sarathi, rate {rate:g}")
    panel.legend()


def _requests(panel: Any, outcomes: Sequence[Outcome]) -> None:
    """Mean seconds of a request in the queue, in prefill and after the first token."""
    names = [outcome.system.name for outcome in outcomes]
    left = [0.0] * len(names)
    for part in ("queue", "prefill", "decode"):
        seconds = [outcome.figures["time_in"][part] for outcome in outcomes]
        panel.barh(names, seconds, left=left, label=part)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    panel.invert_yaxis()
    panel.set_xlabel("mean seconds of a request, highest rate")
    panel.legend()


def _steps(panel: Any, outcomes: Sequence[Outcome]) -> None:
    """Shares of the seconds of all steps, by cost term."""
    names = [outcome.system.name for outcome in outcomes]
    terms = sorted({term for outcome in outcomes for term in outcome.figures["step_terms"]})
    left = [0.0] * len(names)
    for term in terms:
        shares = [outcome.figures["step_terms"].get(term, 0.0) for outcome in outcomes]
        panel.barh(names, shares, left=left, label=term)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    panel.invert_yaxis()
    panel.set_xlabel("share of the time of all steps")
    panel.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)
