"""Communication-efficient sparse attention on torch's fused kernels, without masks or gathers.

Every piece is full or plain causal attention between two strided ranges, so it is a view of q, k
and v and one call of a kernel that returns the LSE. Partials are merged into a float32 accumulator:
with w = sigmoid(lse_new - lse_old), out += w * (out_new - out).

Shapes: T queries, S keys, N query heads, K KV heads, H head width; b
batch, n heads and t rows of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sps2_mega.kernels.attention.sdpa import attend_dense
from sps2_mega.kernels.csa.batches import Batch, batch_pieces, split_triangles
from sps2_mega.kernels.csa.piece import Piece

# Along the diagonal torch's CPU kernel computes whole blocks of 512 keys: 256
# wasted per row, a fifth of a triangle of 2048. Small triangles and the
# rectangles between them waste a quarter of that.
_LONGEST_TRIANGLE_CPU = 128


def attend_pieces(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    pieces: Sequence[Piece],
    *,
    scale: float,
    q_start: int = 0,
    k_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint pieces, as `reference.attend_pieces`.

    Args:
        q_TNH: [T, N, H].
        k_SKH, v_SKH: [S, K, H].
        pieces: disjoint pieces; their ranges are positions in tokens.
        scale: factor of the scores.
        q_start: position of row 0 of q.
        k_start: position of row 0 of k and v.

    Raises:
        ValueError: a piece reaches outside the given queries, keys or KV heads.
    """
    out_TNH = torch.zeros(q_TNH.shape, device=q_TNH.device)
    lse_TN1 = torch.full((*q_TNH.shape[:2], 1), -torch.inf, device=q_TNH.device)
    q_TNH, k_SKH, v_SKH = (_unit_last_stride(x) for x in (q_TNH, k_SKH, v_SKH))
    if q_TNH.device.type == "cpu":
        pieces = split_triangles(pieces, _LONGEST_TRIANGLE_CPU)
    for batch in batch_pieces(pieces):
        _check_bounds(batch, q_TNH, k_SKH, q_start, k_start)
        query_view = partial(
            _view,
            batch,
            batch.first.queries,
            batch.query_step,
            row_0=q_start,
            per_head=q_TNH.shape[1] // k_SKH.shape[1],
        )
        key_view = partial(
            _view, batch, batch.first.keys, batch.key_step, row_0=k_start, per_head=1
        )
        new = _attend_batch(
            query_view(q_TNH),
            key_view(k_SKH),
            key_view(v_SKH),
            scale=scale,
            causal=batch.first.causal,
        )
        _merge_into(query_view(out_TNH), query_view(lse_TN1).squeeze(3), *new, fresh=batch.fresh)
    return out_TNH.to(q_TNH.dtype), lse_TN1.squeeze(2)


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_bounds(batch: Batch, q_TNH: Tensor, k_SKH: Tensor, q_start: int, k_start: int) -> None:
    """Check that a batch lies inside the tensors: a strided view would silently read past them."""
    last = batch.last()
    for name, low, high, start, stop in (
        ("queries", batch.first.queries[0], last.queries[-1], q_start, q_start + len(q_TNH)),
        ("keys", batch.first.keys[0], last.keys[-1], k_start, k_start + len(k_SKH)),
        ("KV heads", batch.first.kv_heads[0], last.kv_heads[-1], 0, k_SKH.shape[1]),
    ):
        if low < start or high >= stop:
            raise ValueError(f"a piece has {name} {low}..{high}, the tensor has [{start}, {stop})")


def _view(
    batch: Batch, rows: range, row_step: int, x: Tensor, *, row_0: int, per_head: int
) -> Tensor:
    """View of a batch's rows and heads in x [rows, heads, width] as [b, n, t, width]."""
    row_stride, head_stride, unit = x.stride()
    heads = batch.first.kv_heads
    return x.as_strided(
        (batch.count, len(heads) * per_head, len(rows), x.shape[2]),
        (
            row_step * row_stride + batch.head_step * per_head * head_stride,
            head_stride,
            rows.step * row_stride,
            unit,
        ),
        x.storage_offset() + (rows[0] - row_0) * row_stride + heads[0] * per_head * head_stride,
    )


def _attend_batch(
    q_bntH: Tensor, k_bnsH: Tensor, v_bnsH: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """out [b, n, t, H] and lse [b, n, t] float32 of a batch of equal shapes."""
    if q_bntH.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_bntH, k_bnsH, v_bnsH, 0.0, causal, scale=scale
        )
        return out, lse.float()
    parts = [
        attend_dense(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale=scale, causal=causal
        )
        for q, k, v in zip(q_bntH, k_bnsH, v_bnsH, strict=True)
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.stack(outs).transpose(1, 2), torch.stack(lses).transpose(1, 2)


def _merge_into(
    out_view: Tensor, lse_view: Tensor, out_bntH: Tensor, lse_bnt: Tensor, *, fresh: bool
) -> None:
    if fresh:
        out_view.copy_(out_bntH)
        lse_view.copy_(lse_bnt)
        return
    # Each row of a piece has a key, so the new LSE is finite and the
    # difference is never between two infinities.
    weight_bnt = torch.sigmoid(lse_bnt - lse_view)
    out_view.lerp_(out_bntH.float(), weight_bnt.unsqueeze(3))
    lse_view.copy_(torch.logaddexp(lse_view, lse_bnt))
