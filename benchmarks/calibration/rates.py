"""Joins what ranks on emulated nodes measured at several link rates.

What a rank does by itself does not depend on the link, nor does the time in which it wakes up for a
small message: of these the middle of all rates is taken. Only what a link carries is each rate's
own.
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
    """One set of terms, with the first rate's links, and the outermost link of each rate."""
    outer = _awake([terms.links[-1] for terms in found if terms.links])
    middle = {
        name: median(getattr(terms, name) for terms in found)
        for name, kind in Terms.__annotations__.items()
        if kind == "float"
    }
    links = (*found[0].links[:-1], *outer[:1])
    return dataclasses.replace(found[0], **middle, links=links), outer


def _awake(links: Sequence[MeasuredLink]) -> list[MeasuredLink]:
    """With everybody's middle latencies."""
    if not links:
        return []
    middle = {name: median(getattr(link, name) for link in links) for name in _OF_THE_HOST}
    return [dataclasses.replace(link, **middle) for link in links]


def with_reduce_latency(terms: Terms, tp_step_s: float, model: ModelConfig) -> Terms:
    """With small sums of the outermost link as a decode step of `model` with TP over all ranks
    shows them: there ranks arrive at different times, which a loop of sums does not show. They are
    two of each layer, and one of the step. Where the step is shorter than all else in it, they
    stay."""
    size = model_size(model)
    reads_s = size.layer_bytes / terms.ranks / terms.read_bytes_per_s
    layer_s = reads_s + terms.layer_overhead_s + terms.call_s
    left_s = tp_step_s - terms.step_overhead_s - size.num_layers * layer_s
    if left_s <= 0:
        return terms
    latency_s = left_s / (2 * size.num_layers + 1)
    link = dataclasses.replace(terms.links[-1], reduce_latency_s=latency_s)
    return dataclasses.replace(terms, links=(*terms.links[:-1], link))
