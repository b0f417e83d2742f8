"""Common clock of the ranks: the offset from `time.perf_counter()` to rank 0's start.

As in NTP, a rank sends a request and rank 0 replies with its time, which is taken as
the time at the middle of the round trip. The shortest of several round trips is the
most accurate; half of it bounds the error.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from sps2_mega.parallel.groups import Group

_ROUNDS = 9


def clock_offset(group: Group) -> float:
    """Seconds to add to `time.perf_counter()` on this rank to get the common clock.

    The common clock is 0 when rank 0 enters this function. All ranks of a CPU group call it.
    """
    zero = time.perf_counter()
    if group.size == 1 or group.rank == 0:
        for rank in range(1, group.size):
            _answer(group, rank, zero)
        return -zero
    return _ask(group)


def _answer(group: Group, rank: int, zero: float) -> None:
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ROUNDS):
        dist.recv(message, group=group.handle, group_src=rank)
        message[0] = time.perf_counter() - zero
        dist.send(message, group=group.handle, group_dst=rank)


def _ask(group: Group) -> float:
    message = torch.zeros(1, dtype=torch.float64)
    best_trip, offset = float("inf"), 0.0
    for _ in range(_ROUNDS):
        asked = time.perf_counter()
        dist.send(message, group=group.handle, group_dst=0)
        dist.recv(message, group=group.handle, group_src=0)
        answered = time.perf_counter()
        if answered - asked < best_trip:
            best_trip = answered - asked
            offset = message.item() - (asked + answered) / 2
    return offset
