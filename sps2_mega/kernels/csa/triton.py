"""Communication-efficient sparse attention in one launch, one program per tile of queries.

A program owns some queries of one KV head, with the query heads of that head as extra
rows, so keys and values are read once per tile. It walks over all key segments of its tile
with a running softmax and writes out and lse once: no partial leaves the chip. Masks occur
only at the ends of segments and along diagonals.

Shapes: T queries, S keys, N query heads, K KV heads, H head width; in the kernel
M rows of a tile, J keys. Row r of a tile is query r // G and query head r % G of
its G heads. Scores are in base 2 inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sps2_mega.kernels.csa.device_tables import device_tables
from sps2_mega.kernels.csa.piece import Piece
from sps2_mega.kernels.csa.tile_shape import padded_width, tile_shape
from sps2_mega.kernels.csa.tiles import SEGMENT_COLUMNS, TILE_COLUMNS
from sps2_mega.kernels.lse.triton import end_softmax, merge

_LOG2_E = 1.4426950408889634
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


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

    The tables of recent lists of pieces are cached on the device.

    Args:
        q_TNH: [T, N, H].
        k_SKH, v_SKH: [S, K, H].
        pieces: disjoint pieces; their ranges are positions in tokens.
        scale: factor of the scores, positive.
        q_start: position of row 0 of q.
        k_start: position of row 0 of k and v.

    Raises:
        ValueError: a piece reaches outside the given queries, keys or KV heads; or the kernel has
            no form for the types, widths or scale.
    """
    _check(q_TNH, k_SKH, v_SKH, scale)
    q_TNH, k_SKH, v_SKH = (x if x.stride(2) == 1 else x.contiguous() for x in (q_TNH, k_SKH, v_SKH))
    (num_q, num_heads, width), num_kv_heads = q_TNH.shape, k_SKH.shape[1]
    if q_TNH.numel() == 0 or num_kv_heads == 0:
        return torch.zeros_like(q_TNH), q_TNH.new_empty((num_q, num_heads), dtype=torch.float32)
    shape = tile_shape(width, q_TNH.element_size())
    group = num_heads // num_kv_heads
    if group > shape.rows:
        raise ValueError(f"{group} query heads per KV head: a tile has {shape.rows} rows")
    tiles, segments, parts = device_tables(
        tuple(pieces),
        range(q_start, q_start + num_q),
        range(k_start, k_start + k_SKH.shape[0]),
        num_kv_heads,
        shape.rows // group,
        q_TNH.device,
    )
    whole = parts == 1
    out_PTNH = torch.empty(
        (parts, *q_TNH.shape), dtype=q_TNH.dtype if whole else torch.float32, device=q_TNH.device
    )
    lse_PTN = torch.empty((parts, num_q, num_heads), device=q_TNH.device)
    _attend_kernel[(len(tiles),)](
        q_TNH,
        k_SKH,
        v_SKH,
        out_PTNH,
        lse_PTN,
        tiles,
        segments,
        scale * _LOG2_E,
        q_start - k_start,
        num_q,
        num_heads,
        q_TNH.stride(0),
        q_TNH.stride(1),
        k_SKH.stride(0),
        k_SKH.stride(1),
        v_SKH.stride(0),
        v_SKH.stride(1),
        TILE_COLUMNS=TILE_COLUMNS,
        SEGMENT_COLUMNS=SEGMENT_COLUMNS,
        GROUP=group,
        WIDTH=width,
        PADDED_WIDTH=padded_width(width),
        ROWS=shape.rows,
        KEYS=shape.keys,
        PRECISION="ieee" if q_TNH.dtype == torch.float32 else "tf32",
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    out_TNH, lse_TN = merge(out_PTNH, lse_PTN)
    return out_TNH.to(q_TNH.dtype), lse_TN


def _check(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, scale: float) -> None:
    if q_TNH.dtype not in _TYPES or not q_TNH.dtype == k_SKH.dtype == v_SKH.dtype:
        raise ValueError(
            f"q, k, v are {q_TNH.dtype}, {k_SKH.dtype}, {v_SKH.dtype}: one of {_TYPES} is needed"
        )
    if q_TNH.dtype == torch.bfloat16 and q_TNH.device.type != "cuda":
        raise ValueError("bfloat16 needs a CUDA device: Triton's interpreter cannot multiply it")
    if k_SKH.shape != v_SKH.shape or q_TNH.shape[2] != k_SKH.shape[2]:
        raise ValueError(f"q {tuple(q_TNH.shape)}, k {tuple(k_SKH.shape)}, v {tuple(v_SKH.shape)}")
    if k_SKH.shape[1] and q_TNH.shape[1] % k_SKH.shape[1]:
        raise ValueError(f"{q_TNH.shape[1]} query heads are no multiple of {k_SKH.shape[1]}")
    if not scale > 0:
        raise ValueError(f"scale {scale}: the kernel needs a positive one")


# Numbers that change from step to step are not specialized: each new
# one would compile the kernel again.
@triton.jit(do_not_specialize=["q_minus_k", "num_q"])
def _attend_kernel(
    q,
    k,
    v,
    out,
    lse,
    tiles,
    segments,
    scale,
    q_minus_k,
    num_q,
    num_heads,
    q_stride_t,
    q_stride_n,
    k_stride_s,
    k_stride_k,
    v_stride_s,
    v_stride_k,
    TILE_COLUMNS: tl.constexpr,
    SEGMENT_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * TILE_COLUMNS
    kv_head = tl.load(tile).to(tl.int64)
    q_first, q_step, q_count = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    segment_begin, segment_end = tl.load(tile + 4), tl.load(tile + 5)
    part = tl.load(tile + 6).to(tl.int64)

    row_M = tl.arange(0, ROWS)
    inside_M = row_M < q_count * GROUP
    q_row_M = q_first + (row_M // GROUP) * q_step
    head_M = kv_head * GROUP + row_M % GROUP
    h_H = tl.arange(0, PADDED_WIDTH)
    inside_MH = inside_M[:, None] & (h_H < WIDTH)[None, :]
    q_at_M = q_row_M.to(tl.int64) * q_stride_t + head_M * q_stride_n
    q_MH = tl.load(q + q_at_M[:, None] + h_H[None, :], mask=inside_MH, other=0.0)

    acc_MH = tl.zeros([ROWS, PADDED_WIDTH], dtype=tl.float32)
    max_M = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros([ROWS], dtype=tl.float32)
    # Rows of k at the positions of each query, of the first and of the last one.
    own_M = q_row_M + q_minus_k
    own_first = q_first + q_minus_k
    own_last = own_first + (q_count - 1) * q_step

    for index in range(segment_begin, segment_end):
        segment = segments + index * SEGMENT_COLUMNS
        k_first, k_step = tl.load(segment), tl.load(segment + 1)
        k_count, causal = tl.load(segment + 2), tl.load(segment + 3)
        seen_M, seen_by_all, seen_by_any = _visible(
            causal, k_first, k_step, k_count, own_M, own_first, own_last, ROWS
        )
        k_step_s, v_step_s = k_step.to(tl.int64) * k_stride_s, k_step.to(tl.int64) * v_stride_s
        k_base = k + k_first.to(tl.int64) * k_stride_s + kv_head * k_stride_k
        v_base = v + k_first.to(tl.int64) * v_stride_s + kv_head * v_stride_k
        unmasked = seen_by_all // KEYS * KEYS
        acc_MH, max_M, sum_M = _walk(
            acc_MH, max_M, sum_M, q_MH, k_base, v_base, k_step_s, v_step_s, 0, unmasked,
            seen_M, seen_by_any, scale, False, WIDTH, PADDED_WIDTH, KEYS, PRECISION,
        )  # fmt: skip
        acc_MH, max_M, sum_M = _walk(
            acc_MH, max_M, sum_M, q_MH, k_base, v_base, k_step_s, v_step_s, unmasked, seen_by_any,
            seen_M, seen_by_any, scale, True, WIDTH, PADDED_WIDTH, KEYS, PRECISION,
        )  # fmt: skip

    out_MH, lse_M = end_softmax(acc_MH, max_M, sum_M)
    row_at_M = (part * num_q + q_row_M) * num_heads + head_M
    tl.store(
        out + row_at_M[:, None] * WIDTH + h_H[None, :],
        out_MH.to(out.dtype.element_ty),
        mask=inside_MH,
    )
    tl.store(lse + row_at_M, lse_M, mask=inside_M)


@triton.jit
def _visible(causal, k_first, k_step, k_count, own_M, own_first, own_last, ROWS: tl.constexpr):
    """Numbers of a segment's keys that each row sees, that all rows see and that any row sees."""
    seen_M = tl.zeros([ROWS], dtype=tl.int32) + k_count
    seen_by_all, seen_by_any = k_count, k_count
    if causal == 1:
        # A causal segment begins at or before the first query, so no dividend is negative.
        seen_M = tl.minimum(seen_M, (own_M - k_first) // k_step + 1)
        seen_by_all = tl.minimum(k_count, (own_first - k_first) // k_step + 1)
        seen_by_any = tl.minimum(k_count, (own_last - k_first) // k_step + 1)
    return seen_M, seen_by_all, seen_by_any


@triton.jit
def _walk(
    acc_MH,
    max_M,
    sum_M,
    q_MH,
    k_base,
    v_base,
    k_step_s,
    v_step_s,
    begin,
    end,
    seen_M,
    num_keys,
    scale,
    MASKED: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running softmax over keys [begin, end) of one segment.

    Masked, row m sees the first seen[m] keys.
    """
    j_J = tl.arange(0, KEYS)
    h_H = tl.arange(0, PADDED_WIDTH)
    k_at_JH = j_J.to(tl.int64)[:, None] * k_step_s + h_H[None, :]
    v_at_JH = j_J.to(tl.int64)[:, None] * v_step_s + h_H[None, :]
    inside_H = h_H < WIDTH
    for j in range(begin, end, KEYS):
        k_at = k_base + j * k_step_s
        v_at = v_base + j * v_step_s
        # Rows past the end are never read: they may hold anything, and NaN times zero is NaN.
        if MASKED:
            inside_JH = (j + j_J < num_keys)[:, None] & inside_H[None, :]
            k_JH = tl.load(k_at + k_at_JH, mask=inside_JH, other=0.0)
            v_JH = tl.load(v_at + v_at_JH, mask=inside_JH, other=0.0)
        elif PADDED_WIDTH != WIDTH:
            k_JH = tl.load(k_at + k_at_JH, mask=inside_H[None, :], other=0.0)
            v_JH = tl.load(v_at + v_at_JH, mask=inside_H[None, :], other=0.0)
        else:
            k_JH = tl.load(k_at + k_at_JH)
            v_JH = tl.load(v_at + v_at_JH)
        score_MJ = tl.dot(q_MH, tl.trans(k_JH), input_precision=PRECISION)
        if MASKED:
            score_MJ = tl.where((j + j_J)[None, :] < seen_M[:, None], score_MJ, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MJ, 1) * scale)
        if MASKED:
            # A row that has seen nothing yet has no maximum: -inf - -inf is NaN.
            shift_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        else:
            shift_M = new_max_M
        weight_MJ = tl.exp2(score_MJ * scale - shift_M[:, None])
        decay_M = tl.exp2(max_M - shift_M)
        sum_M = sum_M * decay_M + tl.sum(weight_MJ, 1)
        acc_MH = acc_MH * decay_M[:, None]
        acc_MH = tl.dot(weight_MJ.to(v_JH.dtype), v_JH, acc_MH, input_precision=PRECISION)
        max_M = new_max_M
    return acc_MH, max_M, sum_M
