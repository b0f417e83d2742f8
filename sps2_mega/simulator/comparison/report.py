"""Tables of simulated comparisons: figures of each system, and gains beside the paper's claims."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sps2_mega.simulator.comparison.setting import Outcome, Setting, layout_of

BASELINE = "sarathi"
BASELINES = (BASELINE, "sarathi-large", "sarathi-wide")
OURS = ("sps2", "sps2-yield", "sps2-csa", "sps2-split")


@dataclass(frozen=True, slots=True)
class Claim:
    """One of the paper's ratios over Sarathi-Serve.

    `value` reads the figure of an outcome; `higher`: more is better.
    """

    name: str
    ratio: float
    value: Callable[[Outcome], float | None]
    higher: bool = False


def _mean(figure: str) -> Callable[[Outcome], float | None]:
    return lambda outcome: (outcome.figures[figure] or {}).get("mean")


def _rate(figure: str) -> Callable[[Outcome], float | None]:
    return lambda outcome: outcome.figures[figure] or None


CLAIMS = (
    Claim("TTFT", 7.5, _mean("ttft_s")),
    Claim("TBT", 1.92, _mean("tbt_s")),
    Claim("response time", 9.8, _mean("response_s")),
    Claim("prefill throughput", 8.2, _rate("prefill_rate"), higher=True),
    Claim("decode throughput", 5.2, _rate("decode_rate"), higher=True),
)


def as_text(setting: Setting, outcomes: Sequence[Outcome]) -> str:
    """Markdown table, a row per system and rate; seconds, and thousands of tokens per second."""
    lines = [
        f"{setting.name}: {len(setting.arrivals)} requests; limits {setting.limits.ttft_s:g} s "
        f"TTFT, {setting.limits.tbt_s:g} s TBT",
        "",
        "| rate | system | layout | TTFT mean | p99 | TBT mean | p99 | response | prefill kt/s | "
        "decode kt/s | good | busy | refused |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        found = outcome.figures
        cells = [
            f"{outcome.rate:g}",
            outcome.system.name,
            layout_of(outcome.system),
            *_two(found["ttft_s"], 1.0, "s"),
            *_two(found["tbt_s"], 1e3, "ms"),
            _two(found["response_s"], 1.0, "s")[0],
            f"{found['prefill_rate'] / 1e3:.3g}",
            f"{found['decode_rate'] / 1e3:.3g}",
            "" if found["good_share"] is None else f"{found['good_share']:.0%}",
            f"{found['busy_share']:.0%}",
            str(found["refused"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains(
    outcomes: Iterable[Outcome], rate: float, ours: str, baseline: str = BASELINE
) -> dict[str, float | None]:
    """Gain of a system over the baseline at one rate, per claim; below 1 it is worse."""
    at = {outcome.system.name: outcome for outcome in outcomes if outcome.rate == rate}
    result: dict[str, float | None] = {}
    for claim in CLAIMS:
        base, own = (claim.value(at[name]) if name in at else None for name in (baseline, ours))
        if not base or not own:
            result[claim.name] = None
        else:
            result[claim.name] = own / base if claim.higher else base / own
    return result


def ratio_table(results: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    """Markdown table, a row per setting, rate, SPS2 system and baseline; claims in the head."""
    head = " | ".join(f"{claim.name} (paper {claim.ratio:g}x)" for claim in CLAIMS)
    lines = [f"| setting | rate | system | over | {head} |", "|---" * (4 + len(CLAIMS)) + "|"]
    for setting, outcomes in results:
        names = {outcome.system.name for outcome in outcomes}
        for rate in sorted({outcome.rate for outcome in outcomes}):
            for base, ours in itertools.product(BASELINES, OURS):
                if base not in names or ours not in names:
                    continue
                found = gains(outcomes, rate, ours, base).values()
                cells = ["" if gain is None else f"{gain:.2f}x" for gain in found]
                lines.append(f"| {setting} | {rate:g} | {ours} | {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _two(spread: Mapping[str, float] | None, factor: float, unit: str) -> tuple[str, str]:
    if spread is None:
        return "", ""
    mean, p99 = (f"{spread[key] * factor:.3g} {unit}" for key in ("mean", "p99"))
    return mean, p99
