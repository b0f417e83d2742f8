"""Communication that goes on while the caller computes: post now, wait later.

    pending = post_shift(current, receive_rows, group)
    ... compute on `current` ...
    current = pending.wait()

What is posted must not be written until `wait` returns. A pending exchange whose `wait` is called
twice is a mistake of ours and asserts. On CUDA `wait` makes the current stream wait, not the
program.

Between CPUs pieces travel as messages (`comm.messages`), and gathers among more than two ranks in
parts: whoever sends and receives one large message in a gloo collective takes up to twice as long
as the line needs.
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
    """One exchange under way, of one or more works; `wait` is called exactly once. `posted_at` and,
    after `wait`, `finished_at` are of `time.perf_counter()`; on CPU the latter is when the bytes
    were there, not when somebody waited for them."""

    def __init__(self, works: Sequence[Any], received: Tensor, sent: Tensor) -> None:
        self.posted_at = time.perf_counter()
        self.finished_at: float | None = None
        self._works, self._received = works, received
        self._sent: Tensor | None = sent  # kept alive until it has left
        self._lock = threading.Lock()
        self._under_way = len(works)
        if not received.is_cuda:
            # Called by gloo's own threads, also while this one computes: torch's operators let
            # others run.
            for work in works:
                work.get_future().add_done_callback(self._finish)

    def wait(self) -> Tensor:
        assert self._sent is not None, "wait() was called before"
        for work in self._works:
            work.wait()
        if self.finished_at is None:  # the callbacks may come a moment after `wait` returns
            self.finished_at = time.perf_counter()
        self._sent = None
        return self._received

    def _finish(self, _future: Any) -> None:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0 and self.finished_at is None:
                self.finished_at = time.perf_counter()


def post_all_to_all(
    x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: Group
) -> Pending:
    """Exchange pieces of a flat tensor: piece r of x goes to rank r; pieces received are in rank
    order."""
    assert group.size > 1, "a group of one rank has nothing to exchange"
    received = x.new_empty(sum(receive_sizes))
    work = _post_pieces(x, received, list(send_sizes), list(receive_sizes), group)
    return Pending([work], received, x)


def post_all_gather(x: Tensor, longest: int, group: Group) -> Pending:
    """Every rank's rows of x [.., ...], each padded to `longest` rows, in rank order: [size *
    longest, ...].

    Ragged shards travel padded: neither gloo nor NCCL gathers ragged tensors natively.
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
        work = all_gather_single(gathered, x, group=group.handle, async_op=True)
        return Pending([work], gathered, x)
    shards = gathered.split(longest)
    works = [
        dist.all_gather(
            [shard[start:end] for shard in shards], x[start:end], group=group.handle, async_op=True
        )
        for start, end in pairwise(bounds)
    ]
    return Pending(works, gathered, x)


def unpadded(gathered: Tensor, counts: Sequence[int]) -> Tensor:
    """Drop the padding of an all-gather: [size * max(counts), ...] -> [sum(counts), ...]."""
    longest = max(counts)
    if min(counts) == longest:
        return gathered
    shards = zip(gathered.split(longest), counts, strict=True)
    return torch.cat([shard[:count] for shard, count in shards])


def post_shift(x: Tensor, receive_rows: int, group: Group) -> Pending:
    """Send x [T, ...] to the next rank of the ring and receive [receive_rows, ...] from the one
    before."""
    assert group.size > 1, "a ring of one rank has nothing to exchange"
    x = x.contiguous()
    received = x.new_empty(receive_rows, *x.shape[1:])
    send_sizes, receive_sizes = [0] * group.size, [0] * group.size
    send_sizes[(group.rank + 1) % group.size] = x.numel()
    receive_sizes[(group.rank - 1) % group.size] = received.numel()
    work = _post_pieces(x.view(-1), received.view(-1), send_sizes, receive_sizes, group)
    return Pending([work], received, x)


def _post_pieces(
    x: Tensor, received: Tensor, send_sizes: list[int], receive_sizes: list[int], group: Group
) -> Any:
    """Piece r of the flat x goes to rank r, piece r of `received` comes from there; the work to
    wait for."""
    group.traffic.bytes_sent += (sum(send_sizes) - send_sizes[group.rank]) * x.itemsize
    if x.is_cuda:
        return dist.all_to_all_single(
            received, x, receive_sizes, send_sizes, group=group.handle, async_op=True
        )
    sends, receives = x.split(send_sizes), received.split(receive_sizes)
    receives[group.rank].copy_(sends[group.rank])
    # Each begins with the rank behind it, so that not all send to the same one first.
    peers = [(group.rank + distance) % group.size for distance in range(1, group.size)]
    return post_messages(
        [(peer, sends[peer]) for peer in peers], [(peer, receives[peer]) for peer in peers], group
    )


def _part_bounds(x: Tensor, longest: int) -> list[int]:
    """Where to cut shards like x, of up to `longest` rows: the same number of parts on every
    rank."""
    if x.is_cuda or longest == 0:
        return [0, longest]
    row_bytes = x.itemsize * math.prod(x.shape[1:])
    num_parts = min(longest, -(-longest * row_bytes // _CPU_PART_BYTES))
    return [longest * part // num_parts for part in range(num_parts + 1)]
