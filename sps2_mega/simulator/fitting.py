"""The two constants that are fitted to published figures, made anew: what the hardware file should say.

Decides how: the GEMM efficiency makes the TP8 prefill exact, the latency makes the worst decode step as good as can be.
"""

from __future__ import annotations

import dataclasses

from sps2_mega.parallel.machine import Link
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.validation import PUBLISHED, Comparison, compare


def fitted_gemm_efficiency(hardware: Hardware) -> float:
    """The share of the peak at which linear layers take what the published prefill leaves to them."""
    (found,) = [c for c in compare(hardware) if c.published.fitted_to == "gemm_efficiency"]
    others = found.seconds - found.terms["linear"]
    return hardware.gemm_efficiency * found.terms["linear"] / (found.published.seconds - others)


def fitted_latency_s(hardware: Hardware) -> float:
    """Seconds of one exchange between nodes, to a microsecond, with the least worst error over the decode steps."""

    def worst(microseconds: int) -> float:
        link = Link(latency_s=microseconds * 1e-6, bytes_per_s=hardware.inter_node.bytes_per_s)
        found = compare(dataclasses.replace(hardware, inter_node=link))
        return max(abs(c.error) for c in _latency_rows(found))

    assert any(row.fitted_to == "latency_s" for row in PUBLISHED)
    return min(range(1, 200), key=worst) * 1e-6


def _latency_rows(found: list[Comparison]) -> list[Comparison]:
    return [c for c in found if c.published.fitted_to == "latency_s"]
