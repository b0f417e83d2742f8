"""The runtime's collectives, on tensors whose row counts may differ between ranks (zero included).

Groups are arguments; for a group of one rank each collective is a local no-op with the same return
shape. The plan gives the row counts of all ranks, so no sizes are exchanged. Bytes of model data
that a rank sends are counted on its group (`Group.traffic`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sps2_mega.comm.exchange import all_gather_single, unpadded

if TYPE_CHECKING:
    from sps2_mega.parallel.groups import Group


def all_gather_rows(x: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Concatenate every rank's rows in rank order: x [counts[rank], ...] -> [sum(counts), ...].

    Ragged counts are padded to the largest: neither gloo nor NCCL gathers ragged tensors natively.
    """
    if group.size == 1:
        return x
    longest = max(counts)
    if longest == 0:
        return x
    if x.shape[0] < longest:
        x = torch.cat([x, x.new_zeros(longest - x.shape[0], *x.shape[1:])])
    gathered = x.new_empty(group.size * longest, *x.shape[1:])
    all_gather_single(gathered, x.contiguous(), group=group.handle)
    group.traffic.bytes_sent += x.nbytes * (group.size - 1)
    return unpadded(gathered, counts)


def all_to_all_flat(
    x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: Group
) -> Tensor:
    """Send piece r of a flat tensor to rank r; return the received pieces in rank order."""
    if group.size == 1:
        return x
    received = x.new_empty(sum(receive_sizes))
    kept = send_sizes[group.rank]
    group.traffic.bytes_sent += (sum(send_sizes) - kept) * x.itemsize
    dist.all_to_all_single(received, x, list(receive_sizes), list(send_sizes), group=group.handle)
    return received


def reduce_scatter_rows(x: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Sum all ranks' x [sum(counts), C] and return this rank's rows of it, [counts[rank], C].

    Summed in rank order, in float32 for 16-bit types, so that every rank gets the bits that one
    rank would.
    """
    if group.size == 1:
        return x
    width, own = x.shape[1], counts[group.rank]
    sizes = [count * width for count in counts]
    pieces = all_to_all_flat(x.reshape(-1), sizes, [own * width] * group.size, group)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return pieces.view(group.size, own, width).sum(0, dtype=wide).to(x.dtype)


def all_gather_last_dim(x: Tensor, group: Group) -> Tensor:
    """Concatenate equal shards along the last dimension: [R, V/size] -> [R, V]."""
    if group.size == 1 or x.shape[0] == 0:
        return x if group.size == 1 else x.new_empty(0, x.shape[-1] * group.size)
    gathered = x.new_empty(group.size, *x.shape)
    all_gather_single(gathered.view(-1, x.shape[-1]), x.contiguous(), group=group.handle)
    group.traffic.bytes_sent += x.nbytes * (group.size - 1)
    return gathered.movedim(0, -2).reshape(*x.shape[:-1], -1)


def minimum(value: int, group: Group) -> int:
    """Minimum of `value` over all ranks of a CPU group."""
    if group.size == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=group.handle)
    return int(tensor.item())


_FIRST_FRAME = 4096


def broadcast_bytes(payload: bytes | None, group: Group) -> bytes:
    """Broadcast rank 0's `payload` over a CPU group; a short one takes a single collective."""
    if group.size == 1:
        assert payload is not None
        return payload
    frame = torch.empty(_FIRST_FRAME, dtype=torch.uint8)
    view = frame.numpy().data
    capacity = _FIRST_FRAME - 8
    if group.rank == 0:
        assert payload is not None
        view[:8] = len(payload).to_bytes(8, "little")
        head = payload[:capacity]
        view[8 : 8 + len(head)] = head
    dist.broadcast(frame, group=group.handle, group_src=0)
    size = int.from_bytes(view[:8], "little")
    if size <= capacity:
        return bytes(view[8 : 8 + size])
    rest = torch.empty(size - capacity, dtype=torch.uint8)
    rest_view = rest.numpy().data
    if group.rank == 0:
        assert payload is not None
        rest_view[:] = payload[capacity:]
    dist.broadcast(rest, group=group.handle, group_src=0)
    return bytes(view[8:]) + bytes(rest_view)


def gather_bytes(payload: bytes, group: Group) -> list[bytes] | None:
    """Gather every rank's `payload` on rank 0 of a CPU group, in rank order; None elsewhere."""
    if group.size == 1:
        return [payload]
    if group.rank > 0:
        dist.send(torch.tensor([len(payload)]), group=group.handle, group_dst=0)
        if payload:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            dist.send(data, group=group.handle, group_dst=0)
        return None
    payloads = [payload]
    for rank in range(1, group.size):
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, group=group.handle, group_src=rank)
        data = torch.empty(int(size.item()), dtype=torch.uint8)
        if len(data):
            dist.recv(data, group=group.handle, group_src=rank)
        payloads.append(data.numpy().tobytes())
    return payloads
