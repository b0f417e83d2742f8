"""Measurements of the emulated cluster as they stand in the result file.

Decides names and comparisons there; `emulated.figures` computes the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.emulated.figures import (
    Sample,
    communication_share,
    end_share,
    hidden_of_hideable,
    middle_of,
    paired,
    summary,
)
from benchmarks.emulated.nodes import rate_name
from benchmarks.emulated.systems import Shape, System


@dataclass(slots=True, kw_only=True)
class Run:
    """Samples of every system at every rate, and its largest difference from one rank's answers.

    `decode` tokens follow the first one.
    """

    shape: Shape
    tokens: int
    decode: int = 0
    systems: list[System]
    samples: dict[str, dict[float | None, list[Sample]]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    tuning: dict[str, float] = field(default_factory=dict)
    balance: float | None = None


def result_of(run: Run, ranks: int) -> dict[str, Any]:
    """The run's part of the result file."""
    return {
        "model": run.shape.about,
        "shape": run.shape.name,
        "tokens": run.tokens,
        "decode": run.decode,
        "balanced_rate": None if run.balance is None else rate_name(run.balance),
        "chunk_sizes_ttft_s": run.tuning,
        "max_logprob_difference": run.differences,
        "compared": {
            rate_name(rate): at_rate(run, rate, ranks)
            for rate in {rate: None for by_rate in run.samples.values() for rate in by_rate}
        },
        "curves": {
            name: {rate_name(rate): summary(samples) for rate, samples in by_rate.items()}
            for name, by_rate in run.samples.items()
        },
    }


def at_rate(run: Run, rate: float | None, ranks: int) -> dict[str, float]:
    """Comparisons at one rate among the systems measured."""
    here = {name: by_rate[rate] for name, by_rate in run.samples.items() if rate in by_rate}
    found = {}
    if {"ulysses", "ulysses-pipelined"} <= here.keys():
        plain, pipelined = middle_of(here["ulysses"]), middle_of(here["ulysses-pipelined"])
        ends = end_share(
            pipelined,
            num_heads=run.shape.num_heads,
            num_kv_heads=run.shape.num_kv_heads,
            ranks=ranks,
            tokens=run.tokens,
        )
        found["ulysses ttft, pipelined / plain"] = paired(
            here["ulysses-pipelined"], here["ulysses"]
        )
        found["ulysses communication / computation, plain"] = communication_share(plain)
        found["share of bytes that cannot be hidden"] = ends
        found["hidden / could be hidden"] = hidden_of_hideable(plain, pipelined, ends)
    for name in here:
        if name.startswith("tp") and "csa-pipelined" in here:
            found[f"ttft {name} / csa-pipelined"] = paired(here[name], here["csa-pipelined"])
    return found
