"""Measurement of each SP level's links: latency of a small exchange, bandwidth of a larger one.

All groups of a level exchange at the same time, as they do in prefill, so that links
shared by several ranks are shared here too. Messages grow until one takes long enough to
be timed, so a slow link needs only the first few.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from sps2_mega.comm.collectives import minimum
from sps2_mega.comm.exchange import post_all_gather, post_all_to_all
from sps2_mega.parallel.groups import Group
from sps2_mega.parallel.machine import Link

_SMALL_ROUNDS, _ROUNDS = 7, 3
_FIRST_BYTES = 128 * 2**10
_LAST_BYTES = {"cpu": 8 * 2**20, "cuda": 128 * 2**20}
_LONG_ENOUGH_S = {"cpu": 0.02, "cuda": 0.004}
_FREE_LINK = Link(latency_s=0.0, bytes_per_s=float("inf"))


def measure_links(
    levels: Sequence[Group], control: Group, device: torch.device
) -> tuple[Link, ...]:
    """Measure one link per level: the slowest that any rank saw.

    All ranks call it and get the same links. `control` is the CPU group of all ranks. A level of
    one rank has no link: zero latency and infinite bandwidth.
    """
    return tuple(_measure(group, control, device) for group in levels)


def measure_gather(sp: Group, control: Group, device: torch.device) -> float:
    """Seconds of a small all-gather over `sp` on the slowest rank; 0 for one rank.

    All ranks call it.
    """
    if sp.size == 1:
        return 0.0
    row = torch.zeros(1, 1, dtype=torch.uint8, device=device)
    samples = []
    for _ in range(_SMALL_ROUNDS):
        began = time.perf_counter()
        _finish(post_all_gather(row, 1, sp).wait())
        samples.append(time.perf_counter() - began)
    return agree_most(min(samples), control)


def agree_most(value: float, control: Group) -> float:
    """Maximum of a non-negative value over all ranks, to nine digits."""
    return -minimum(-round(value * 1e9), control) / 1e9


def _measure(group: Group, control: Group, device: torch.device) -> Link:
    if group.size == 1:
        return _FREE_LINK
    _exchange_s(group, group.size, device)  # connections are made at first use
    latency = min(_exchange_s(group, group.size, device) for _ in range(_SMALL_ROUNDS))
    latency = agree_most(latency, control)
    num_bytes = _FIRST_BYTES
    while True:
        seconds = agree_most(_exchange_s(group, num_bytes, device), control)
        if seconds > _LONG_ENOUGH_S[device.type] or num_bytes >= _LAST_BYTES[device.type]:
            break
        num_bytes *= 2
    # A shaped link lets a first burst pass for free, so that exchange did not count.
    samples, busy = [], []
    for _ in range(_ROUNDS):
        began = time.process_time()
        seconds = _exchange_s(group, num_bytes, device)
        busy.append(agree_most(time.process_time() - began, control))
        samples.append(agree_most(seconds, control))
    taken = median(samples)
    return Link(
        latency_s=latency,
        bytes_per_s=num_bytes / max(taken - latency, taken / 10),
        core_s_per_byte=median(busy) / num_bytes if device.type == "cpu" else 0.0,
    )


def _exchange_s(group: Group, num_bytes: int, device: torch.device) -> float:
    """Seconds for each rank to exchange `num_bytes` with its peers, in equal parts, both ways."""
    part = max(1, num_bytes // (group.size - 1))
    sizes = [part] * group.size
    sizes[group.rank] = 0
    payload = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    _finish(payload)
    began = time.perf_counter()
    _finish(post_all_to_all(payload, sizes, sizes, group).wait())
    return time.perf_counter() - began


def _finish(x: Tensor) -> None:
    """Wait for the device, without which a measured time would be meaningless."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
