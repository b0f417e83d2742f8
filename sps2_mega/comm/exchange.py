"""Exchanges that run while the caller computes: post now, wait later.

    pending = post_shift(current, receive_rows, group)
    ... compute on `current` ...
    current = pending.wait()

A posted tensor must not be written until `wait` returns. Calling `wait` twice is a bug and asserts.
On CUDA `wait` makes the current stream wait, not the program.

Between CPUs pieces travel as messages (`comm.messages`), and gathers among more than two ranks in
parts: a rank that sends and receives one large message in a gloo collective takes up to twice as
long as the line needs.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sps2_mega.comm.messages import post_messages

if TYPE_CHECKING:
    from sps2_mega.parallel.groups import Group

# torch 2.13 renamed it and warns about the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_CPU_PART_BYTES = 512 * 2**10


class Pending:
    """Exchange in flight, of one or more collectives; `wait` is called exactly once.

    `posted_at` and, after `wait`, `finished_at` are times of `time.perf_counter()`. On CPU an
    exchange finishes when the bytes have arrived, not when somebody waits for them.
    """

    def __init__(self, handles: Sequence[Any], received: Tensor, sent: Tensor) -> None:
        self.posted_at = time.perf_counter()
        self.finished_at: float | None = None
        self._handles, self._received = handles, received
        self._sent: Tensor | None = sent  # kept alive until it has left
        self._lock = threading.Lock()
        self._in_flight = len(handles)
        if not received.is_cuda:
            # gloo's own threads call it, also while this one computes: torch's operators release
            # the interpreter.
            for handle in handles:
                handle.get_future().add_done_callback(self._finish)

    def wait(self) -> Tensor:
        """Wait until the exchange is done; return the received tensor."""
        assert self._sent is not None, "wait() was called before"
        for handle in self._handles:
            handle.wait()
        if self.finished_at is None:  # callbacks may run a moment after `wait` returns
            self.finished_at = time.perf_counter()
        self._sent = None
        return self._received

    def _finish(self, _future: Any) -> None:
        with self._lock:
            self._in_flight -= 1
            if self._in_flight == 0 and self.finished_at is None:
                self.finished_at = time.perf_counter()


def post_all_to_all(
    x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: Group
) -> Pending:
    """Exchange pieces of a flat tensor: piece r of x goes to rank r, results are in rank order."""
    assert group.size > 1, "a group of one rank has nothing to exchange"
    received = x.new_empty(sum(receive_sizes))
    handle = _post_pieces(x, received, list(send_sizes), list(receive_sizes), group)
    return Pending([handle], received, x)


def post_all_gather(x: Tensor, longest: int, group: Group) -> Pending:
    """Gather every rank's rows of x, padded to `longest` each: [size * longest, ...] in rank order.

    Shards travel padded, as neither gloo nor NCCL gathers ragged tensors; `unpadded` drops the
    padding again.
    """
    assert group.size > 1, "a group of one rank has nothing to exchange"
    if x.shape[0] < longest:
        x = torch.cat([x, x.new_zeros(longest - x.shape[0], *x.shape[1:])])
    x = x.contiguous()
    gathered = x.new_empty(group.size * longest, *x.shape[1:])
    if group.size == 2 and not x.is_cuda:
        group.traffic.bytes_sent += x.nbytes
        shards, peer = gathered.view(2, *x.shape), 1 - group.rank
        shards[group.rank].copy_(x)
        return Pending([post_messages([(peer, x)], [(peer, shards[peer])], group)], gathered, x)
    group.traffic.bytes_sent += x.nbytes * (group.size - 1)
    bounds = _part_bounds(x, longest)
    if len(bounds) == 2:
        handle = all_gather_single(gathered, x, group=group.handle, async_op=True)
        return Pending([handle], gathered, x)
    shards = gathered.split(longest)
    handles = [
        dist.all_gather(
            [shard[start:end] for shard in shards], x[start:end], group=group.handle, async_op=True
        )
        for start, end in pairwise(bounds)
    ]
    return Pending(handles, gathered, x)


def unpadded(gathered: Tensor, counts: Sequence[int]) -> Tensor:
    """Drop the padding of an all-gather: [size * max(counts), ...] -> [sum(counts), ...]."""
    longest = max(counts)
    if min(counts) == longest:
        return gathered
    shards = zip(gathered.split(longest), counts, strict=True)
    return torch.cat([shard[:count] for shard, count in shards])


def post_shift(x: Tensor, receive_rows: int, group: Group) -> Pending:
    """Send x [T, ...] to the next rank of a ring, receive [receive_rows, ...] from the previous."""
    assert group.size > 1, "a ring of one rank has nothing to exchange"
    x = x.contiguous()
    received = x.new_empty(receive_rows, *x.shape[1:])
    send_sizes, receive_sizes = [0] * group.size, [0] * group.size
    send_sizes[(group.rank + 1) % group.size] = x.numel()
    receive_sizes[(group.rank - 1) % group.size] = received.numel()
    handle = _post_pieces(x.view(-1), received.view(-1), send_sizes, receive_sizes, group)
    return Pending([handle], received, x)


def _post_pieces(
    x: Tensor, received: Tensor, send_sizes: list[int], receive_sizes: list[int], group: Group
) -> Any:
    """Send piece r of the flat x to rank r, receive piece r of `received` from it."""
    group.traffic.bytes_sent += (sum(send_sizes) - send_sizes[group.rank]) * x.itemsize
    if x.is_cuda:
        return dist.all_to_all_single(
            received, x, receive_sizes, send_sizes, group=group.handle, async_op=True
        )
    sends, receives = x.split(send_sizes), received.split(receive_sizes)
    receives[group.rank].copy_(sends[group.rank])
    # Each rank begins with the one after it, so that not all send to the same rank first.
    peers = [(group.rank + distance) % group.size for distance in range(1, group.size)]
    return post_messages(
        [(peer, sends[peer]) for peer in peers], [(peer, receives[peer]) for peer in peers], group
    )


def _part_bounds(x: Tensor, longest: int) -> list[int]:
    """Return where to cut shards of up to `longest` rows: equally many parts on every rank."""
    if x.is_cuda or longest == 0:
        return [0, longest]
    row_bytes = x.itemsize * math.prod(x.shape[1:])
    num_parts = min(longest, -(-longest * row_bytes // _CPU_PART_BYTES))
    return [longest * part // num_parts for part in range(num_parts + 1)]
