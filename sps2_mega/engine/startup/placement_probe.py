"""Measurement of feed-forward and output layers, whole and in slices, for `weight_placement`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sps2_mega.comm.probe import agree_most
from sps2_mega.mcore.gpt import GPT
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.weight_placement import Placement, PlacementTimes, WeightPlacement

_ROWS = (1, 8, 32)
_ROUNDS = 2
# So many layers in a row are timed that their weights are read from memory, as in a step.
_LAYERS = 4


def measure_placement(
    chosen: Placement | None, model: GPT, groups: ParallelGroups, device: torch.device
) -> WeightPlacement:
    """Placement of a job, from the configuration (None: the faster one) and this machine.

    All ranks of the pool call it and get the same times.
    """
    if chosen is not None or groups.sp.size == 1:
        return WeightPlacement(forced=chosen or "owner")
    layers = range(min(_LAYERS, model.num_layers))

    def feed_forward(hidden_T1C: Tensor, counts: Sequence[int] | None) -> None:
        model.feed_forward(hidden_T1C, layers, counts)

    def output(hidden_T1C: Tensor, counts: Sequence[int] | None) -> None:
        model.logits(hidden_T1C, counts)

    def times(run: Callable[[Tensor, Sequence[int] | None], None]) -> PlacementTimes:
        return _times(run, model.hidden_size, model.dtype, groups, device)

    return WeightPlacement(None, times(feed_forward), times(output))


def _times(
    run: Callable[[Tensor, Sequence[int] | None], None],
    width: int,
    dtype: torch.dtype,
    groups: ParallelGroups,
    device: torch.device,
) -> PlacementTimes:
    sp = groups.sp
    size, first = sp.size, sp.rank == 0

    def seconds(rows: int, counts: Sequence[int] | None, *, takes_part: bool = True) -> float:
        hidden = torch.zeros(rows, 1, width, dtype=dtype, device=device)
        samples = []
        for _ in range(_ROUNDS + 1):  # the first one warms up
            agree_most(0.0, groups.control)
            began = time.perf_counter()
            if takes_part:
                run(hidden, counts)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples.append(time.perf_counter() - began)
        return agree_most(min(samples[1:]), groups.control)

    alone, busy, sliced = [], [], []
    for rows in _ROWS:
        counts = [rows // size + (rank < rows % size) for rank in range(size)]
        alone.append(seconds(rows, None, takes_part=first))
        busy.append(seconds(rows, None))
        sliced.append(seconds(counts[sp.rank], counts))
    return PlacementTimes(_ROWS, tuple(alone), tuple(busy), tuple(sliced))
