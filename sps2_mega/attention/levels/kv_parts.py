"""Number of parts, by KV heads, into which the exchanges of a prefill step are cut. Pure ints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sps2_mega.attention.layout.causal_pairs import causal_pairs
from sps2_mega.attention.pipeline.micro_batches import num_micro_batches

if TYPE_CHECKING:
    from sps2_mega.attention.csa.pattern import CSAPattern
    from sps2_mega.attention.layout.token_layout import PrefillLayout
    from sps2_mega.attention.pipeline.micro_batches import SmallestPart
    from sps2_mega.attention.pipeline.settings import PipelineSettings


def num_kv_parts(
    layout: PrefillLayout,
    patterns: Sequence[CSAPattern],
    settings: PipelineSettings,
    *,
    num_heads: int,
    num_kv_heads: int,
    row_bytes: int,
    head_dim: int,
    smallest: SmallestPart,
) -> int:
    """Number of parts of each exchange of a laid-out step, the same on every rank.

    Args:
        patterns: one per sequence of the step.
        num_heads: query heads of one TP rank; `num_kv_heads` likewise.
        row_bytes: bytes of one head of one token.
        smallest: the least bytes and FLOPs that are worth a part.
    """
    bounds = zip(layout.queries.first, layout.queries.last, strict=True)
    return kv_parts_of_counts(
        settings,
        num_pairs=sum(causal_pairs(range(first, last)) for first, last in bounds),
        num_keys=sum(layout.keys.counts),
        sp_size=len(layout.keys.counts),
        degree=min(pattern.degrees[-1] for pattern in patterns),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        row_bytes=row_bytes,
        head_dim=head_dim,
        smallest=smallest,
    )


def kv_parts_of_counts(
    settings: PipelineSettings,
    *,
    num_pairs: int,
    num_keys: int,
    sp_size: int,
    degree: int,
    num_heads: int,
    num_kv_heads: int,
    row_bytes: int,
    head_dim: int,
    smallest: SmallestPart,
) -> int:
    """Number of parts from means over SP ranks, at most one per KV head.

    Args:
        num_pairs: causal (query, key) pairs of one head, before sparsity.
        num_keys: tokens of all ranks together, new and cached.
        degree: CSA's degree of the outermost level; 1 for exact attention.
        num_heads: query heads of one TP rank; `num_kv_heads` likewise.
        row_bytes: bytes of one head of one token.
        smallest: the least bytes and FLOPs that are worth a part.
    """
    shares = sp_size * degree
    wanted = num_micro_batches(
        settings,
        num_bytes=2 * num_keys * num_kv_heads * row_bytes * (sp_size - 1) // shares,
        flops=4 * num_pairs * num_heads * head_dim // shares,
        smallest=smallest,
    )
    return min(wanted, num_kv_heads)
