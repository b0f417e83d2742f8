"""Links between ranks under this project's traffic: rows to the next rank, all-to-alls, TP sums.

Libraries reach different shares of a line for each of them (gloo's all-to-all may send in one
direction after the other), so the first gives the rate, and the others are stated as factors over
the time that this rate predicts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.calibration.timer import Timer
from sps2_mega.attention.pipeline.micro_batches import WINDOW
from sps2_mega.comm.exchange import post_all_to_all, post_shift
from sps2_mega.comm.probe import agree_most, measure_links
from sps2_mega.parallel.groups import Group
from sps2_mega.parallel.machine import Link

_SMALL_BYTES, _SMALL_ROUNDS = 1024, 150
_BUSY_WIDTH = 256  # a third of a millisecond of a CPU core
_ROUNDS = 12  # an exchange may take once or twice as long, by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLink:
    """Link of one SP level; factors are relative to the time that `bytes_per_s` predicts."""

    latency_s: float
    bytes_per_s: float
    exchange_factor: float = 1.0
    stream_factor: float = 1.0
    reduce_factor: float = 1.0
    reduce_latency_s: float = 0.0


def measured_links(groups: Sequence[Group], timer: Timer) -> tuple[MeasuredLink, ...]:
    """Links of every SP level of several ranks (collective; the same result on all)."""
    probed = measure_links(groups, timer.control, timer.device)
    return tuple(_measured(group, link, timer) for group, link in zip(groups, probed, strict=True))


def middle_links(looks: Sequence[Sequence[MeasuredLink]]) -> tuple[MeasuredLink, ...]:
    """Median of several measurements of the same links, figure by figure.

    One measurement takes seconds, as long as disturbances of a shared machine last.
    """
    names = [field.name for field in dataclasses.fields(MeasuredLink)]
    return tuple(
        MeasuredLink(**{name: median(getattr(link, name) for link in seen) for name in names})
        for seen in zip(*looks, strict=True)
    )


def _among_computing(call: Callable[[], None], timer: Timer) -> float:
    """Median seconds of a small call between computations, as in decode steps, on the slowest rank.

    A waiting rank is woken up first, which a loop of exchanges alone would not show.
    """
    matrix = torch.ones(_BUSY_WIDTH, _BUSY_WIDTH, dtype=timer.dtype, device=timer.device)
    samples = []
    for _ in range(_SMALL_ROUNDS):
        torch.mm(matrix, matrix)
        timer.finish()
        began = time.perf_counter()
        call()
        timer.finish()
        samples.append(time.perf_counter() - began)
    return agree_most(median(samples), timer.control)


def _exchange(group: Group, device: torch.device) -> None:
    sizes = [_SMALL_BYTES] * group.size
    sizes[group.rank] = 0
    row = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    post_all_to_all(row, sizes, sizes, group).wait()


def _reduce(group: Group, device: torch.device) -> None:
    dist.all_reduce(torch.zeros(_SMALL_BYTES // 4, device=device), group=group.handle)


def _measured(group: Group, probed: Link, timer: Timer) -> MeasuredLink:
    x = torch.zeros(_sent_bytes(probed), dtype=torch.uint8, device=timer.device)
    count, others = x.numel(), group.size - 1
    shift_s = timer.agreed(lambda: post_shift(x, count, group).wait(), least=_ROUNDS)
    rate = count / max(shift_s - probed.latency_s, shift_s / 10)
    sizes = [count // others] * group.size
    sizes[group.rank] = 0
    parts = x[: sum(sizes)]
    exchange_s = timer.agreed(
        lambda: post_all_to_all(parts, sizes, sizes, group).wait(), least=_ROUNDS
    )
    stream_s = timer.agreed(partial(_stream, parts, sizes, group), least=_ROUNDS)
    summed = torch.zeros(count // 4, dtype=torch.float32, device=timer.device)
    reduce_s = timer.agreed(lambda: dist.all_reduce(summed, group=group.handle), least=_ROUNDS)
    reduced = 2.0 * others / group.size * summed.nbytes
    return MeasuredLink(
        latency_s=_among_computing(partial(_exchange, group, timer.device), timer),
        reduce_latency_s=_among_computing(partial(_reduce, group, timer.device), timer),
        bytes_per_s=rate,
        exchange_factor=max(exchange_s - probed.latency_s, exchange_s / 10) * rate / parts.nbytes,
        stream_factor=max(stream_s - probed.latency_s, stream_s / 10) * rate / parts.nbytes,
        reduce_factor=max(reduce_s - others * probed.latency_s, reduce_s / 10) * rate / reduced,
    )


def _stream(x: Tensor, sizes: Sequence[int], group: Group) -> None:
    """The bytes of one exchange as several in flight at once, as the pipeline has them."""
    pending = []
    few = [size // WINDOW for size in sizes]
    for part in x[: sum(few) * WINDOW].chunk(WINDOW):
        pending.append(post_all_to_all(part, few, few, group))
    for each in pending:
        each.wait()


def _sent_bytes(link: Link) -> int:
    """Bytes of a typical exchange: some hundredths of a second, clamped, a multiple of 4."""
    most = 2**22 if link.bytes_per_s < 5e9 else 2**28
    return int(min(max(0.05 * link.bytes_per_s, 2**19), most)) // 4 * 4
