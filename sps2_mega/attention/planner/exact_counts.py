"""Calls, merges, copies and micro-batches of each exact transport in one layer. Pure ints."""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.attention.layout.heads import split_heads
from sps2_mega.attention.pipeline.micro_batches import (
    CPU_PART,
    CUDA_PART,
    Cut,
    cut_by_heads_and_queries,
    num_micro_batches,
)
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.attention.planner.overlap import WHOLE
from sps2_mega.attention.planner.step_shape import StepShape, busiest


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Attention of the busiest rank between two exchanges.

    `pairs` are (query, key, head) triples, `merged_rows` the rows of queries whose partials are
    merged.
    """

    pairs: int
    calls: int
    merged_rows: int


def attention_steps(transport: str, shape: StepShape) -> list[AttentionStep]:
    """Steps of one layer: one for each SP rank in a ring, else a single one."""
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
            steps.append(AttentionStep(pairs * shape.num_heads, max(calls), max(rows)))
        return steps
    if transport == "pass_q":
        partials = [[shape.partials(r, p) for r in ranks] for p in ranks]
        return [
            AttentionStep(
                busiest(list(zip(*shape.pairs, strict=True))) * shape.num_heads,
                max(sum(calls for calls, _ in row) for row in partials),
                max(sum(rows for _, rows in row) for row in partials),
            )
        ]
    if transport == "ulysses":
        shares = split_heads(shape.num_heads, shape.num_kv_heads, shape.size)
        heads = max(len(heads) for heads, _ in shares)
        return [AttentionStep(sum(map(sum, shape.pairs)) * heads, 1, 0)]
    return [AttentionStep(busiest(shape.pairs) * shape.num_heads, 1, 0)]


def copied_numbers(transport: str, shape: StepShape) -> int:
    """Numbers that the busiest rank copies to reorder them, counted once for each time."""
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


def layer_cut(
    transport: str,
    *,
    num_bytes: int,
    flops: int,
    num_kv_heads: int,
    most_kv_heads: int,
    query_tokens: int,
    on_cpu: bool,
) -> Cut:
    """Micro-batches of one layer, as the transports cut it.

    Args:
        num_bytes: sent by a rank; `flops` computed by it; both as means over ranks.
        num_kv_heads: KV heads of one TP rank.
        most_kv_heads: KV heads of the SP rank that has most when heads are dealt (`ulysses`).
        query_tokens: queries of the rank that has most.
    """
    if transport == "ring":
        return WHOLE
    wanted = num_micro_batches(
        PipelineSettings(),
        num_bytes=num_bytes,
        flops=flops,
        smallest=CPU_PART if on_cpu else CUDA_PART,
    )
    if transport == "ulysses":
        return cut_by_heads_and_queries(
            wanted, kv_heads=most_kv_heads, query_tokens=max(1, query_tokens)
        )
    return Cut(head_groups=min(wanted, num_kv_heads), query_parts=1)
