"""Transport of a prefill step with exact attention: the one with the fewest seconds per layer.

    computing      attention of the busiest rank, its calls, merges and copies
    on the links   bytes between ranks, and a latency for each message
    the layer      both, in the pipeline's stage order (`overlap`)

Between CPUs latencies are time of a core and never hidden, and bytes are also copied into the
kernel and out of it. A pure function of the step and of what was measured of the machine, so all
ranks choose alike without communicating. It decides no placement: each transport gives the same
result whatever lies where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sps2_mega.attention.layout.heads import most_kv_heads
from sps2_mega.attention.pipeline.micro_batches import Cut
from sps2_mega.attention.planner.exact_counts import (
    AttentionStep,
    attention_steps,
    copied_numbers,
    layer_cut,
)
from sps2_mega.attention.planner.link_time import (
    by_cargo,
    link_seconds,
    measured_layer_s,
    message_seconds,
    sockets_s,
)
from sps2_mega.attention.planner.overlap import (
    NO_TRAVEL,
    WHOLE,
    LayerSeconds,
    TravelSeconds,
    exact_layer,
)
from sps2_mega.attention.planner.step_shape import StepShape
from sps2_mega.attention.planner.traffic import Matrix, bytes_moved, num_messages
from sps2_mega.parallel.machine import Machine

TRANSPORTS = ("ulysses", "gather", "ring", "pass_q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One transport in one layer of a step.

    `bytes_sent[r]` are those of SP rank r; `pairs` counts (query, key, head) of the busiest rank.
    """

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
    """The chosen transport, the reason in one sentence, and all estimates, fastest first."""

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
    """Bytes, messages, pairs and seconds of one transport in one layer.

    With `overlap` the pipeline is on.
    """
    moved = bytes_moved(transport, shape)
    cut = _cut(transport, shape, moved, machine) if overlap else WHOLE
    micro_batches = cut.head_groups * cut.query_parts
    steps = attention_steps(transport, shape)
    layer = _layer(transport, shape, moved, steps, cut, machine, overlap=overlap)
    messages = num_messages(transport, shape.size)
    return Estimate(
        transport=transport,
        bytes_sent=tuple(map(sum, moved)),
        messages=cut.head_groups * messages.keys
        + micro_batches * (messages.queries + messages.results),
        pairs=sum(step.pairs for step in steps),
        micro_batches=micro_batches,
        comm_s=layer.comm_s,
        compute_s=layer.compute_s,
        seconds=layer.total_s,
    )


def handling_s(transport: str, shape: StepShape, moved: Matrix, machine: Machine) -> float:
    """Seconds of the busiest rank beside attention: copies, and between CPUs sockets."""
    seconds = machine.copy_s * copied_numbers(transport, shape)
    if machine.on_cpu:
        seconds += max(sockets_s(moved, shape.itemsize, machine))
    return seconds


def _travel(transport: str, shape: StepShape, moved: Matrix, machine: Machine) -> TravelSeconds:
    """Link seconds of one layer, by cargo."""
    total_s = link_seconds(moved, machine)
    queries_s = total_s if transport == "pass_q" else 0.0
    if transport == "ulysses":
        without_keys = replace(shape, keys=(0,) * shape.size)
        queries_s = link_seconds(bytes_moved(transport, without_keys), machine)
    return by_cargo(transport, queries_s=queries_s, total_s=total_s)


def _layer(
    transport: str,
    shape: StepShape,
    moved: Matrix,
    steps: Sequence[AttentionStep],
    cut: Cut,
    machine: Machine,
    *,
    overlap: bool,
) -> LayerSeconds:
    """The layer from its steps, bytes and messages.

    Where a short layer was measured, it stands for latencies and calls.
    """
    measured_s = None
    if shape.size > 1:
        measured_s = measured_layer_s(transport, max(shape.queries), machine)
    call_s = machine.call_s if measured_s is None else 0.0
    row_merge_s = machine.merge_s * shape.num_heads * shape.head_dim
    # A score and a weighted value of a pair: H multiply-adds each.
    compute_s = [
        step.pairs * 4 * shape.head_dim / machine.flops_per_s
        + step.calls * call_s
        + step.merged_rows * row_merge_s
        for step in steps
    ]
    parts = cut.head_groups * cut.query_parts
    compute_s[0] += handling_s(transport, shape, moved, machine)
    compute_s[0] += (parts - 1) * sum(step.calls for step in steps) * call_s
    layer = exact_layer(
        transport,
        cut,
        _travel(transport, shape, moved, machine),
        NO_TRAVEL if measured_s is not None else message_seconds(transport, shape.size, machine),
        compute_s,
        on_cpu=machine.on_cpu,
        pipelined=overlap,
    )
    if measured_s is None:
        return layer
    # What more tokens add to the first part is waiting, which the others fill with work.
    beside_s = measured_s + (parts - 1) * machine.layer_s[transport][0]
    return replace(layer, total_s=layer.total_s + beside_s, comm_s=layer.comm_s + beside_s)


def _cut(transport: str, shape: StepShape, moved: Matrix, machine: Machine) -> Cut:
    pairs = sum(map(sum, shape.pairs)) * shape.num_heads
    return layer_cut(
        transport,
        num_bytes=sum(map(sum, moved)) // shape.size,
        flops=4 * shape.head_dim * pairs // shape.size,
        num_kv_heads=shape.num_kv_heads,
        most_kv_heads=most_kv_heads(shape.num_heads, shape.num_kv_heads, shape.size),
        query_tokens=max(shape.queries),
        on_cpu=machine.on_cpu,
    )


def _seconds(found: Estimate) -> float:
    return found.seconds


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
