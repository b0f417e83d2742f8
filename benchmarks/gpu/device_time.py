"""Timing of device work by CUDA events, over graph replays where single launches are too short.

A launch from Python costs tens of microseconds, more than a decode kernel takes; a serving loop
hides that in a graph, and so do we. On CPU it is plain wall-clock time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Work = Callable[[], Any]


def seconds(work: Work, device: torch.device) -> float:
    """Seconds of one call on an idle device."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def in_graph(works: Sequence[Work], device: torch.device) -> Work:
    """Warm up all works and return one callable that runs them in order: a graph on CUDA."""
    for work in works:
        work()
    if device.type != "cuda":
        return lambda: [work() for work in works]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return graph.replay


def medians(contestants: dict[str, Work], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each contestant.

    They take turns after one warm-up round, so that a change of clocks hits all.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(repeats + 1):
        for name, work in contestants.items():
            taken = seconds(work, device)
            if round_number:
                samples[name].append(taken)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def copy_bandwidth(device: torch.device, num_bytes: int, repeats: int) -> float:
    """Bytes read plus bytes written per second by the device's own copy.

    This is the ceiling of reading kernels.
    """
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = medians({"copy": lambda: target.copy_(source)}, device, repeats)
    return 2 * num_bytes / taken["copy"]
