"""Number of micro-batches of a layer's attention, from the bytes it sends and its FLOPs.

Both ends of a pipeline are exposed: the inputs of the first micro-batch and the way back of the
last one have nothing to hide behind. With M micro-batches about 1/M of the communication stays
visible. More are better until each exchange costs more latency, and each computation more launches
and small tiles, than hiding still gains. Past 8 the visible part shrinks by less than a tenth of
the communication, so 8 is the most. Below that, an exchange should carry enough bytes and a
computation enough work to be worth their fixed costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sps2_mega.attention.pipeline.settings import PipelineSettings

MAX_AUTO = 8

# Micro-batches that may be in flight in each direction. With 1, the keys and values of the next
# heads, several times the bytes of a part of queries, could hide behind one part's computation.
WINDOW = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallestPart:
    """Bytes sent and FLOPs computed by a rank below which a micro-batch does not pay."""

    num_bytes: int
    flops: int


# About ten times the fixed cost: gloo over Ethernet takes 0.1-0.2 ms per exchange, a core 30-100
# GFLOP/s. On CUDA an exchange of two communicators takes 30 us at 50 GB/s, a few kernels 20 us at
# some 400 TFLOP/s.
CPU_PART = SmallestPart(num_bytes=128 * 1024, flops=100_000_000)
CUDA_PART = SmallestPart(num_bytes=4 * 1024 * 1024, flops=50_000_000_000)


def num_micro_batches(
    settings: PipelineSettings, *, num_bytes: int, flops: int, smallest: SmallestPart
) -> int:
    """Return the micro-batches of a layer in which a rank sends `num_bytes` and computes `flops`.

    1 is no overlap. Mode `on` cuts in two even where it does not pay. Where nothing travels,
    nothing is cut.
    """
    if settings.micro_batches is not None:
        return settings.micro_batches
    if settings.mode == "off" or num_bytes == 0:
        return 1
    worth = min(MAX_AUTO, num_bytes // smallest.num_bytes, flops // smallest.flops)
    return max(worth, 2 if settings.mode == "on" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Cut into `head_groups` groups of KV heads times `query_parts` parts of the query tokens."""

    head_groups: int
    query_parts: int


def cut_by_heads_and_queries(wanted: int, *, kv_heads: int, query_tokens: int) -> Cut:
    """Cut into about `wanted` micro-batches, heads first.

    `kv_heads` and `query_tokens` are of the rank with most. Cutting heads also divides K and V,
    which queries of all parts need, and costs attention nothing; cutting queries tears their causal
    triangle into pieces.
    """
    head_groups = max(1, min(wanted, kv_heads))
    query_parts = max(1, min(-(-wanted // head_groups), query_tokens))
    return Cut(head_groups=head_groups, query_parts=query_parts)
