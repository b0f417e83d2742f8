"""Communication that goes on while the caller computes: post now, wait later.

    pending = post_shift(current, receive_rows, group)
    ... compute on `current` ...
    current = pending.wait()

What is posted must not be written until `wait` returns. A pending exchange that is dropped without `wait` is
a mistake of ours and asserts.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from sps2_mega.parallel.groups import Group


class Pending:
    """One exchange under way; `wait` is called exactly once."""

    def __init__(self, work: Any, received: Tensor, sent: Tensor) -> None:
        self._work, self._received = work, received
        self._sent: Tensor | None = sent  # kept alive until it has left

    def wait(self) -> Tensor:
        assert self._sent is not None, "wait() was called before"
        self._work.wait()
        self._sent = None
        return self._received


def post_shift(x: Tensor, receive_rows: int, group: Group) -> Pending:
    """Send x [T, ...] to the next rank of the ring and receive [receive_rows, ...] from the one before.

    It is an all-to-all with one non-empty piece: gloo makes progress on those by itself, on point-to-point
    sends it does not.
    """
    assert group.size > 1, "a ring of one rank has nothing to exchange"
    x = x.contiguous()
    received = x.new_empty(receive_rows, *x.shape[1:])
    send_sizes, receive_sizes = [0] * group.size, [0] * group.size
    send_sizes[(group.rank + 1) % group.size] = x.numel()
    receive_sizes[(group.rank - 1) % group.size] = received.numel()
    work = dist.all_to_all_single(
        received.view(-1), x.view(-1), receive_sizes, send_sizes, group=group.handle, async_op=True
    )
    group.traffic.bytes_sent += x.nbytes
    return Pending(work, received, x)
