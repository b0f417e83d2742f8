"""Which transport a prefill step takes: seconds from bytes, messages and arithmetic, then the
least.

    seconds per layer = communication + attention of the busiest rank; calls, merges and copies are
    attention's
    with overlap        latencies + the longer of bytes and attention, and 1/M of the shorter
                        latencies + sum over steps of the longer of the two                      ring

M is the number of micro-batches. Latencies are never hidden: with parts of useful size they are
small, and where ranks share cores they are time on a core. So are bytes between CPUs, which are
copied into the kernel and out of it. A pure function of the step and of what was measured of the
machine, so all ranks choose alike without a word. It decides no placement: whatever lies where,
each transport gives the same result.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from sps2_mega.attention.layout.heads import split_heads
from sps2_mega.attention.pipeline.settings import (
    CPU_PART,
    CUDA_PART,
    PipelineSettings,
    num_micro_batches,
)
from sps2_mega.attention.planner.step_shape import StepShape, busiest
from sps2_mega.attention.planner.traffic import Matrix, bytes_moved, num_messages
from sps2_mega.parallel.machine import PROBED_TOKENS, Machine

TRANSPORTS = ("ulysses", "gather", "ring", "pass_q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One transport in one layer of a step. `bytes_sent[r]` is sp rank r's; `pairs` counts (query,
    key, head) of the busiest rank."""

    transport: str
    bytes_sent: tuple[int, ...]
    messages: int
    pairs: int
    micro_batches: int
    comm_s: float
    compute_s: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The chosen transport, why (one sentence), and all estimates, fastest first."""

    transport: str
    reason: str
    estimates: tuple[Estimate, ...]


def choose(
    shape: StepShape,
    machine: Machine,
    candidates: Sequence[str] = TRANSPORTS,
    *,
    overlap: bool = True,
) -> Choice:
    """The fastest of the candidates; among equals the one named first."""
    assert candidates, "there is nothing to choose from"
    found = sorted(
        (estimate(name, shape, machine, overlap=overlap) for name in candidates), key=_seconds
    )
    best = found[0]
    reason = (
        f"{_ms(best.seconds)} per layer ({max(best.bytes_sent) / 1e6:.3g} MB in "
        f"{_ms(best.comm_s)}, "
        f"attention {_ms(best.compute_s)})"
    )
    if len(found) > 1:
        others = ", ".join(f"{other.transport} {_ms(other.seconds)}" for other in found[1:])
        reason += f"; {others}"
    return Choice(transport=best.transport, reason=reason, estimates=tuple(found))


def estimate(
    transport: str, shape: StepShape, machine: Machine, *, overlap: bool = True
) -> Estimate:
    """Bytes, messages, pairs and seconds of one transport in one layer; `overlap`: with the
    pipeline on."""
    moved = bytes_moved(transport, shape)
    flops_per_pair = 4 * shape.head_dim  # a score and a weighted value: H multiply-adds each
    travelling_s = link_seconds(moved, machine)
    steps = _steps(transport, shape)
    row_merge_s = machine.merge_s * shape.num_heads * shape.head_dim
    layer_s = _layer_s(transport, shape, machine)
    call_s = machine.call_s if layer_s is None else 0.0
    step_s = [
        step.pairs * flops_per_pair / machine.flops_per_s
        + step.calls * call_s
        + step.merged_rows * row_merge_s
        for step in steps
    ]
    step_s[0] += machine.copy_s * _rearranged(transport, shape)
    if machine.on_cpu:
        step_s[0] += max(sockets_s(moved, shape.itemsize, machine))
    micro_batches = 1
    if overlap and transport != "ring":
        micro_batches = num_micro_batches(
            PipelineSettings(),
            num_bytes=max(map(sum, moved)),
            flops=sum(step.pairs for step in steps) * flops_per_pair,
            smallest=CPU_PART if machine.on_cpu else CUDA_PART,
        )
        if transport != "ulysses":  # they are cut by KV heads alone
            micro_batches = min(micro_batches, shape.num_kv_heads)
        step_s[0] += (micro_batches - 1) * sum(step.calls for step in steps) * call_s
    messages = num_messages(transport, shape.size) * micro_batches
    if layer_s is None:
        latency_s = micro_batches * _latency_s(transport, shape.size, machine)
    else:
        # What more tokens add to the first part is waiting, which the others fill with work.
        latency_s = layer_s + (micro_batches - 1) * machine.layer_s[transport][0]
    compute_s = sum(step_s)
    if not overlap:
        seconds = travelling_s + compute_s
    elif transport == "ring":
        per_hop = travelling_s / max(1, shape.size - 1)
        seconds = sum(max(per_hop, step) for step in step_s[:-1]) + step_s[-1]
    else:
        shorter, longer = sorted((travelling_s, compute_s))
        seconds = longer + shorter / micro_batches
    seconds += latency_s
    comm_s = travelling_s + latency_s
    pairs = sum(step.pairs for step in steps)
    return Estimate(
        transport=transport,
        bytes_sent=tuple(map(sum, moved)),
        messages=messages,
        pairs=pairs,
        micro_batches=micro_batches,
        comm_s=comm_s,
        compute_s=compute_s,
        seconds=seconds,
    )


def link_seconds(moved: Matrix, machine: Machine) -> float:
    """Seconds until all bytes have crossed: levels work at the same time, so the slowest one
    counts.

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


def _layer_s(transport: str, shape: StepShape, machine: Machine) -> float | None:
    """What the step's layer takes beside bytes and FLOPs, in a straight line between the measured
    sizes and level outside; None where that was not measured."""
    known = machine.layer_s.get(transport)
    if known is None or shape.size == 1:
        return None
    (few, many), (least, most) = PROBED_TOKENS, known
    share = (max(shape.queries) - few) / (many - few)
    return least + (most - least) * min(1.0, max(0.0, share))


def _latency_s(transport: str, size: int, machine: Machine) -> float:
    """Seconds of one layer's exchanges if they carried nothing. An all-gather of the library passes
    from rank to rank without coming back to us, a ring of ours does not."""
    latency_s = max(link.latency_s for link in machine.links)
    if machine.gather_s is None or size == 1:
        return num_messages(transport, size) * latency_s
    gathers, others = {
        "gather": (2, 0),  # K and V
        "ring": (0, size - 1),
        "ulysses": (0, 3),
        "pass_q": (1, 1),
    }[transport]
    return gathers * machine.gather_s + others * latency_s


@dataclass(frozen=True, slots=True)
class _Step:
    """Attention of the busiest rank that waits for the step before: (query, key, head), calls, and
    rows of queries whose partials are merged."""

    pairs: int
    calls: int
    merged_rows: int


def _steps(transport: str, shape: StepShape) -> list[_Step]:
    ranks = range(shape.size)
    if transport == "ring":
        # In step s rank r works on the keys of rank r - s; all wait for the slowest before they
        # pass on.
        steps = []
        for s in ranks:
            calls, rows = zip(
                *(shape.partials(r, (r - s) % shape.size) for r in ranks), strict=True
            )
            pairs = max(shape.pairs[r][(r - s) % shape.size] for r in ranks)
            steps.append(_Step(pairs * shape.num_heads, max(calls), max(rows)))
        return steps
    if transport == "pass_q":
        work = [[shape.partials(r, p) for r in ranks] for p in ranks]
        return [
            _Step(
                busiest(list(zip(*shape.pairs, strict=True))) * shape.num_heads,
                max(sum(calls for calls, _ in row) for row in work),
                max(sum(rows for _, rows in row) for row in work),
            )
        ]
    if transport == "ulysses":
        shares = split_heads(shape.num_heads, shape.num_kv_heads, shape.size)
        heads = max(len(heads) for heads, _ in shares)
        return [_Step(sum(map(sum, shape.pairs)) * heads, 1, 0)]
    return [_Step(busiest(shape.pairs) * shape.num_heads, 1, 0)]


def _rearranged(transport: str, shape: StepShape) -> int:
    """Numbers that the busiest rank copies to bring them into another order, once for each time."""
    if shape.size == 1:
        return 0
    queries = max(shape.queries) * shape.num_heads
    keys = 2 * max(shape.keys) * shape.num_kv_heads
    rows = {
        "ring": keys,  # K beside V
        "gather": 2 * sum(shape.keys) * shape.num_kv_heads,  # all of them into sequence order
        # Packed by rank twice over, unpacked into sequence order, and outputs both ways.
        "ulysses": 3 * (queries + keys) + 2 * queries,
        "pass_q": 3 * shape.size * queries,  # outputs with their LSE, packed and unpacked
    }
    return rows[transport] * shape.head_dim


def sockets_s(moved: Matrix, itemsize: int, machine: Machine) -> list[float]:
    """Seconds of its cores that each rank spends on bytes that it sends and receives; where that
    was not measured, two copies of each number."""
    per_byte = max(link.core_s_per_byte for link in machine.links) / 2 or (
        2 * machine.copy_s / itemsize
    )
    sent, received = map(sum, moved), map(sum, zip(*moved, strict=True))
    return [sum(both) * per_byte for both in zip(sent, received, strict=True)]


def _seconds(found: Estimate) -> float:
    return found.seconds


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
