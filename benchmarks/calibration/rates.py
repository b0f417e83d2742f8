"""Join of what ranks on emulated nodes measured at several link rates.

A rank's own work does not depend on the link, nor does its wake-up time for a small message: their
medians over all rates are taken. Only what a link carries is kept per rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median

from benchmarks.calibration.links import MeasuredLink
from benchmarks.calibration.terms import Terms
from sps2_mega.config import ModelConfig
from sps2_mega.simulator.model_size import model_size

_OF_THE_HOST = ("latency_s", "reduce_latency_s")


def joined(found: Sequence[Terms]) -> tuple[Terms, list[MeasuredLink]]:
    """One set of terms with the first rate's links, and the outermost link of each rate."""
    outer = _awake([terms.links[-1] for terms in found if terms.links])
    middle = {
        name: median(getattr(terms, name) for terms in found)
        for name, kind in Terms.__annotations__.items()
        if kind == "float"
    }
    links = (*found[0].links[:-1], *outer[:1])
    return dataclasses.replace(found[0], **middle, links=links), outer


def _awake(links: Sequence[MeasuredLink]) -> list[MeasuredLink]:
    """The links with median latencies over all rates."""
    if not links:
        return []
    middle = {name: median(getattr(link, name) for link in links) for name in _OF_THE_HOST}
    return [dataclasses.replace(link, **middle) for link in links]


def with_reduce_latency(terms: Terms, tp_step_s: float, model: ModelConfig) -> Terms:
    """The terms with the latency of small sums on the outermost link, taken from a decode step.

    `tp_step_s` is a step of `model` with TP over all ranks. Ranks arrive there at different times,
    which a loop of sums does not show. A step has two sums per layer and one more. If the step is
    shorter than all else in it, the terms stay as they are.
    """
    size = model_size(model)
    reads_s = size.layer_bytes / terms.ranks / terms.read_bytes_per_s
    layer_s = reads_s + terms.layer_overhead_s + terms.call_s
    left_s = tp_step_s - terms.step_overhead_s - size.num_layers * layer_s
    if left_s <= 0:
        return terms
    latency_s = left_s / (2 * size.num_layers + 1)
    link = dataclasses.replace(terms.links[-1], reduce_latency_s=latency_s)
    return dataclasses.replace(terms, links=(*terms.links[:-1], link))
