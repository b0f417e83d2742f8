"""Merge of attention partials by their log-sum-exp, in one pass over the partials.

A program merges a few (query, head) rows: first the LSEs, for their maximum, then each partial's
output once. Kernels that merge their own partials, in another layout, call `merge_rows`.

Shapes: P partials, T queries, N heads, H head width; in the kernel R rows of (query, head).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of one partial in a program: 16 bytes for each of 128 threads, in 16-bit types.
_TILE_ELEMENTS = 2048
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


def merge(out_PTNH: Tensor, lse_PTN: Tensor) -> tuple[Tensor, Tensor]:
    """Merge P partials, as `reference.merge`."""
    if out_PTNH.shape[0] == 1:
        return out_PTNH[0], lse_PTN[0]
    out_PTNH = _unit_last_stride(out_PTNH)
    merged_TNH, lse_TN = _like(out_PTNH[0])
    if merged_TNH.numel():
        rows, padded = _tile(merged_TNH.shape[2])
        num_rows = lse_TN.numel()
        _merge_kernel[(triton.cdiv(num_rows, rows),)](
            out_PTNH,
            lse_PTN,
            merged_TNH,
            lse_TN,
            out_PTNH.shape[0],
            num_rows,
            merged_TNH.shape[1],
            *out_PTNH.stride()[:3],
            *lse_PTN.stride(),
            WIDTH=merged_TNH.shape[2],
            PADDED_WIDTH=padded,
            ROWS=rows,
        )
    return merged_TNH, lse_TN


def merge_two(
    out_a_TNH: Tensor, lse_a_TN: Tensor, out_b_TNH: Tensor, lse_b_TN: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge two partials, as `reference.merge_two`.

    Rows [R, H] with lse [R] count as the heads of one token.
    """
    if out_a_TNH.dim() == 2:
        one_token = (x.unsqueeze(0) for x in (out_a_TNH, lse_a_TN, out_b_TNH, lse_b_TN))
        merged_1RH, lse_1R = merge_two(*one_token)
        return merged_1RH[0], lse_1R[0]
    out_a_TNH, out_b_TNH = _unit_last_stride(out_a_TNH), _unit_last_stride(out_b_TNH)
    merged_TNH, lse_TN = _like(out_a_TNH)
    if merged_TNH.numel():
        rows, padded = _tile(merged_TNH.shape[2])
        num_rows = lse_TN.numel()
        _merge_two_kernel[(triton.cdiv(num_rows, rows),)](
            out_a_TNH,
            lse_a_TN,
            out_b_TNH,
            lse_b_TN,
            merged_TNH,
            lse_TN,
            num_rows,
            merged_TNH.shape[1],
            *out_a_TNH.stride()[:2],
            *lse_a_TN.stride(),
            *out_b_TNH.stride()[:2],
            *lse_b_TN.stride(),
            WIDTH=merged_TNH.shape[2],
            PADDED_WIDTH=padded,
            ROWS=rows,
        )
    return merged_TNH, lse_TN


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(out_TNH: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate a merged result of this shape and type."""
    merged_TNH = torch.empty(out_TNH.shape, dtype=out_TNH.dtype, device=out_TNH.device)
    return merged_TNH, torch.empty(out_TNH.shape[:2], device=out_TNH.device)


def _tile(width: int) -> tuple[int, int]:
    """(rows of a program, padded head width)."""
    padded = 1 << (width - 1).bit_length()
    return max(1, _TILE_ELEMENTS // padded), padded


@triton.jit
def merge_rows(
    out,
    lse,
    num_partials,
    out_stride_p,
    lse_stride_p,
    out_at_RH,
    lse_at_R,
    inside_R,
    inside_RH,
):
    """Merge rows of several partials: out [R, H] float32 and lse [R].

    Args:
        out, lse: pointers to the partials.
        num_partials: number of partials.
        out_stride_p, lse_stride_p: elements between two partials.
        out_at_RH, lse_at_R: offsets of the rows inside a partial.
        inside_R, inside_RH: masks of valid rows and elements.
    """
    max_R = tl.full(lse_at_R.shape, float("-inf"), dtype=tl.float32)
    for p in range(num_partials):
        at_p = lse + tl.cast(p, tl.int64) * lse_stride_p
        lse_R = tl.load(at_p + lse_at_R, mask=inside_R, other=float("-inf"))
        max_R = tl.maximum(max_R, lse_R)
    # A row that sees no key anywhere has no maximum: -inf - -inf is NaN.
    shift_R = tl.where(max_R == float("-inf"), 0.0, max_R)
    acc_RH = tl.zeros(out_at_RH.shape, dtype=tl.float32)
    sum_R = tl.zeros(lse_at_R.shape, dtype=tl.float32)
    for p in range(num_partials):
        at_p = lse + tl.cast(p, tl.int64) * lse_stride_p
        weight_R = tl.exp(tl.load(at_p + lse_at_R, mask=inside_R, other=float("-inf")) - shift_R)
        out_p = out + tl.cast(p, tl.int64) * out_stride_p
        part_RH = tl.load(out_p + out_at_RH, mask=inside_RH, other=0.0).to(tl.float32)
        acc_RH += weight_R[:, None] * part_RH
        sum_R += weight_R
    return _finish(acc_RH, sum_R, shift_R)


@triton.jit
def end_softmax(acc_RH, max_R, sum_R):
    """(out, lse) of a running softmax in base 2; rows without keys give 0 and -inf."""
    empty_R = sum_R == 0.0
    safe_R = tl.where(empty_R, 1.0, sum_R)
    return acc_RH / safe_R[:, None], (max_R + tl.log2(safe_R)) * _LN_2


@triton.jit
def _finish(acc_RH, sum_R, shift_R):
    empty_R = sum_R == 0.0
    safe_R = tl.where(empty_R, 1.0, sum_R)
    lse_R = tl.where(empty_R, float("-inf"), shift_R + tl.log(safe_R))
    return acc_RH / safe_R[:, None], lse_R


# Numbers that change from step to step are not specialized: each new
# one would compile the kernel again.
@triton.jit(do_not_specialize=["num_partials", "num_rows", "lse_stride_p"])
def _merge_kernel(
    out,
    lse,
    merged,
    merged_lse,
    num_partials,
    num_rows,
    num_heads,
    out_stride_p,
    out_stride_t,
    out_stride_n,
    lse_stride_p,
    lse_stride_t,
    lse_stride_n,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t_R, n_R = row_R // num_heads, row_R % num_heads
    h_H = tl.arange(0, PADDED_WIDTH)
    inside_R = row_R < num_rows
    inside_RH = inside_R[:, None] & (h_H < WIDTH)[None, :]
    out_at_RH = (t_R * out_stride_t + n_R * out_stride_n)[:, None] + h_H[None, :]
    lse_at_R = t_R * lse_stride_t + n_R * lse_stride_n
    out_RH, lse_R = merge_rows(
        out,
        lse,
        num_partials,
        out_stride_p,
        lse_stride_p,
        out_at_RH,
        lse_at_R,
        inside_R,
        inside_RH,
    )
    at_RH = (row_R * WIDTH)[:, None] + h_H[None, :]
    tl.store(merged + at_RH, out_RH.to(merged.dtype.element_ty), mask=inside_RH)
    tl.store(merged_lse + row_R, lse_R, mask=inside_R)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_two_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    merged,
    merged_lse,
    num_rows,
    num_heads,
    a_stride_t,
    a_stride_n,
    lse_a_stride_t,
    lse_a_stride_n,
    b_stride_t,
    b_stride_n,
    lse_b_stride_t,
    lse_b_stride_n,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t_R, n_R = row_R // num_heads, row_R % num_heads
    h_H = tl.arange(0, PADDED_WIDTH)
    inside_R = row_R < num_rows
    inside_RH = inside_R[:, None] & (h_H < WIDTH)[None, :]
    lse_a_R = tl.load(
        lse_a + t_R * lse_a_stride_t + n_R * lse_a_stride_n, mask=inside_R, other=float("-inf")
    )
    lse_b_R = tl.load(
        lse_b + t_R * lse_b_stride_t + n_R * lse_b_stride_n, mask=inside_R, other=float("-inf")
    )
    max_R = tl.maximum(lse_a_R, lse_b_R)
    shift_R = tl.where(max_R == float("-inf"), 0.0, max_R)
    weight_a_R, weight_b_R = tl.exp(lse_a_R - shift_R), tl.exp(lse_b_R - shift_R)
    a_at_RH = (t_R * a_stride_t + n_R * a_stride_n)[:, None] + h_H[None, :]
    b_at_RH = (t_R * b_stride_t + n_R * b_stride_n)[:, None] + h_H[None, :]
    a_RH = tl.load(out_a + a_at_RH, mask=inside_RH, other=0.0).to(tl.float32)
    b_RH = tl.load(out_b + b_at_RH, mask=inside_RH, other=0.0).to(tl.float32)
    acc_RH = weight_a_R[:, None] * a_RH + weight_b_R[:, None] * b_RH
    out_RH, lse_R = _finish(acc_RH, weight_a_R + weight_b_R, shift_R)
    at_RH = (row_R * WIDTH)[:, None] + h_H[None, :]
    tl.store(merged + at_RH, out_RH.to(merged.dtype.element_ty), mask=inside_RH)
    tl.store(merged_lse + row_R, lse_R, mask=inside_R)
