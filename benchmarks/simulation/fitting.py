"""Fit of the two constants of hardware/h100-meta.yaml to published figures.

One rule for both, the least worst error over the rows of `published` that name the constant:
`gemm_efficiency` over the prefills and `latency_s` over the decode steps between nodes. Each hardly
moves the other's rows, so they are fitted in turns until neither changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.simulation.published import compare
from sps2_mega.simulator.hardware import Hardware

_ROUNDS = 5


def fitted(hardware: Hardware) -> tuple[float, float]:
    """Fit (`gemm_efficiency` to a thousandth, `latency_s` between nodes to a microsecond).

    `hardware` has the first guess.
    """
    found = hardware
    for _ in range(_ROUNDS):
        before = found
        found = _least_worst("gemm_efficiency", found, _with_efficiency, 1000)
        found = _least_worst("latency_s", found, _with_latency, 200)
        if found == before:
            break
    return found.gemm_efficiency, found.inter_node.latency_s


def _with_efficiency(hardware: Hardware, thousandths: int) -> Hardware:
    return hardware.replace(gemm_efficiency=thousandths / 1000)


def _with_latency(hardware: Hardware, microseconds: int) -> Hardware:
    link = dataclasses.replace(hardware.inter_node, latency_s=microseconds / 1e6)
    return hardware.replace(inter_node=link)


def _least_worst(
    constant: str, hardware: Hardware, changed: Callable[[Hardware, int], Hardware], most: int
) -> Hardware:
    """Hardware with the number in 1 .. `most` that has the least worst error.

    Each row's error only falls and then rises with a constant, and so does the worst of them:
    coarse steps find the valley, fine ones its ground.
    """

    def worst(number: int) -> float:
        return max(abs(row.error) for row in compare(changed(hardware, number), constant))

    near = min(range(10, most + 1, 10), key=worst)
    return changed(hardware, min(range(max(1, near - 10), min(most, near + 10) + 1), key=worst))
