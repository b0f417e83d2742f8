"""Seconds that bytes and messages take on a measured machine: its links, latencies and cores."""

from __future__ import annotations

import operator
from itertools import accumulate

from sps2_mega.attention.planner.overlap import NO_TRAVEL, TravelSeconds
from sps2_mega.attention.planner.traffic import Matrix, num_messages
from sps2_mega.parallel.machine import PROBED_TOKENS, Machine


def link_seconds(moved: Matrix, machine: Machine) -> float:
    """Seconds until all bytes have crossed: levels work at the same time, the slowest one counts.

    At level l the ranks of one inner group share what they send per second, so a single sender
    among them (a ring has one per group) gets all of it.
    """
    bounds = [1, *accumulate(machine.sp_levels, operator.mul)]
    slowest = 0.0
    for level, link in enumerate(machine.links):
        inner, outer = bounds[level], bounds[level + 1]
        groups = len(moved) // inner
        out, into = [0] * groups, [0] * groups
        for sender, row in enumerate(moved):
            for receiver, count in enumerate(row):
                same_outer = sender // outer == receiver // outer
                if count and same_outer and sender // inner != receiver // inner:
                    out[sender // inner] += count
                    into[receiver // inner] += count
        slowest = max(slowest, max(out + into) / (inner * link.bytes_per_s))
    return slowest


def by_cargo(transport: str, *, queries_s: float, total_s: float) -> TravelSeconds:
    """Share of keys, queries and results in the link seconds of a layer.

    `queries_s` are the link seconds of a layer without keys. Results weigh as much as queries.
    """
    results_s = queries_s / 2 if transport in ("ulysses", "pass_q") else 0.0
    return TravelSeconds(
        keys_s=total_s - queries_s, queries_s=queries_s - results_s, results_s=results_s
    )


def message_seconds(transport: str, size: int, machine: Machine) -> TravelSeconds:
    """Seconds of one layer's exchanges if they carried nothing.

    An all-gather of the library passes from rank to rank without coming back to us, a ring of ours
    does not: where a small all-gather was measured (`Machine.gather_s`), it counts as a whole.
    """
    if size == 1:
        return NO_TRAVEL
    count = num_messages(transport, size)
    latency_s = max(link.latency_s for link in machine.links)
    keys_s, queries_s = count.keys * latency_s, count.queries * latency_s
    if machine.gather_s is not None and transport == "gather":
        keys_s = 2 * machine.gather_s  # K and V
    if machine.gather_s is not None and transport == "pass_q":
        queries_s = machine.gather_s
    return TravelSeconds(keys_s=keys_s, queries_s=queries_s, results_s=count.results * latency_s)


def measured_layer_s(transport: str, tokens: int, machine: Machine) -> float | None:
    """Seconds of a layer of `tokens` on the busiest rank beside its bytes and FLOPs.

    In a straight line between the measured sizes and level outside; None where the transport was
    not measured.
    """
    known = machine.layer_s.get(transport)
    if known is None:
        return None
    (few, many), (least, most) = PROBED_TOKENS, known
    share = (tokens - few) / (many - few)
    return least + (most - least) * min(1.0, max(0.0, share))


def sockets_s(moved: Matrix, itemsize: int, machine: Machine) -> list[float]:
    """Seconds of its cores that each rank spends on bytes that it sends and receives.

    Two copies of each number where that was not measured.
    """
    per_byte = max(link.core_s_per_byte for link in machine.links) / 2 or (
        2 * machine.copy_s / itemsize
    )
    sent, received = map(sum, moved), map(sum, zip(*moved, strict=True))
    return [sum(both) * per_byte for both in zip(sent, received, strict=True)]
