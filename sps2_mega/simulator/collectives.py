"""Seconds of collectives outside attention: all-reduces of TP, and the small exchanges of decode.

    all-reduce, one node     reduce-scatter and gather: 2 exchanges, 2 (t-1)/t of the bytes
    over n nodes             as above inside each node, and between nodes a ring of the t/n-th part:
                             n - 1 exchanges in both directions at once, 2 (n-1)/n of its bytes
    all-to-all               1 exchange over the slowest link, all peers at once

Attention's own transports are priced by `transport_cost` and `sparse_cost`.
"""

from __future__ import annotations

from sps2_mega.parallel.machine import Machine
from sps2_mega.simulator.hardware import Hardware


def all_reduce_s(num_bytes: float, ranks: int, hardware: Hardware) -> float:
    """Seconds to sum a tensor of `num_bytes` over `ranks` neighbouring GPUs."""
    local = min(ranks, hardware.gpus_per_node)
    nodes = -(-ranks // hardware.gpus_per_node)
    seconds = 0.0
    if local > 1:
        link = hardware.intra_node
        moved = 2.0 * (local - 1) / local * num_bytes
        seconds += 2 * link.latency_s + moved / link.bytes_per_s
    if nodes > 1:
        link = hardware.inter_node
        moved = 2.0 * (nodes - 1) / nodes * num_bytes / local * hardware.reduce_factor
        latency_s = hardware.reduce_latency_s or (nodes - 1) * link.latency_s
        seconds += latency_s + moved / link.bytes_per_s
    return seconds


def all_to_all_s(bytes_sent: float, machine: Machine) -> float:
    """Seconds until every SP rank has sent `bytes_sent`, in equal parts to all others."""
    size = 1
    for level in machine.sp_levels:
        size *= level
    if size == 1:
        return 0.0
    # Of the other ranks, those outside the inner group are reached over the outer link.
    seconds, inner = 0.0, 1
    for ranks, link in zip(machine.sp_levels, machine.links, strict=True):
        outer = inner * ranks
        seconds = max(seconds, bytes_sent * (outer - inner) / (size - 1) / link.bytes_per_s)
        inner = outer
    return seconds + max(link.latency_s for link in machine.links)
