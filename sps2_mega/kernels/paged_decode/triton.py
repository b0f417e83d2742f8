"""One-token attention over a block table: many programs per row read the cache in place, once.

A program reads one chunk of one row's cached tokens for one KV head; that head's query heads are
the rows of its tile. If a row has several chunks, a second launch merges their partials:

    row b, KV head   [start ... chunk 0 ...][... chunk 1 ...][... chunk 2, end) -> partials -> merge

Lengths stay on the device: the grid covers the longest possible row, and programs past a
row's end stop at once. Shapes: B rows, N query heads, K KV heads, H head width; C
chunks; in the kernel G query heads, J tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sps2_mega.kernels.lse.triton import end_softmax, merge_rows
from sps2_mega.kernels.paged_decode.chunks import chunk_len
from sps2_mega.kernels.paged_decode.tile_shape import tile_shape
from sps2_mega.kernels.processors import num_processors

_LOG2_E = 1.4426950408889634
_MERGED_ROWS = 8  # query heads of a program that merges


def paged_decode(
    q_BNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_table_BM: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One-token attention, as `reference.paged_decode`; no value is copied to the host.

    Args:
        q_BNH: [B, N, H].
        k_cache, v_cache: [blocks, block_size, K, H].
        block_table_BM: [B, M] block ids, int32.
        starts_B, ends_B: [B] tokens, int32.
        scale: factor of the scores, positive.

    Raises:
        ValueError: types or widths without a form of the kernel, or tables of other row counts.
    """
    _check(q_BNH, k_cache, v_cache, block_table_BM, starts_B, ends_B, scale)
    num_rows, num_heads, width = q_BNH.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    longest = block_table_BM.shape[1] * block_size
    chunk = chunk_len(
        num_rows=num_rows,
        num_kv_heads=num_kv_heads,
        longest=longest,
        num_processors=num_processors(q_BNH.device),
    )
    num_chunks = max(1, -(-longest // chunk))
    out = torch.empty(q_BNH.shape, dtype=q_BNH.dtype, device=q_BNH.device)
    lse = torch.empty((num_rows, num_heads), device=q_BNH.device)
    if out.numel() == 0:
        return out, lse
    out_C, lse_C = out, lse
    if num_chunks > 1:
        out_C = torch.empty((num_chunks, *q_BNH.shape), dtype=torch.float32, device=q_BNH.device)
        lse_C = torch.empty((num_chunks, num_rows, num_heads), device=q_BNH.device)
    group = num_heads // num_kv_heads
    shape = tile_shape(width, group, q_BNH.dtype)
    q_BNH = q_BNH if q_BNH.stride(2) == 1 else q_BNH.contiguous()
    _decode_kernel[(num_kv_heads, num_chunks, num_rows)](
        q_BNH,
        k_cache,
        v_cache,
        block_table_BM,
        starts_B,
        ends_B,
        out_C,
        lse_C,
        scale * _LOG2_E,
        chunk,
        num_rows,
        num_heads,
        *q_BNH.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *block_table_BM.stride(),
        BLOCK_SIZE=block_size,
        GROUP=group,
        PADDED_GROUP=shape.heads,
        WIDTH=width,
        PADDED_WIDTH=shape.width,
        TOKENS=shape.tokens,
        PRECISION=shape.precision,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    if num_chunks > 1:
        _merge_chunks(out_C, lse_C, starts_B, ends_B, out, lse, chunk, shape.width)
    return out, lse


def _merge_chunks(
    out_C: Tensor,
    lse_C: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
    out: Tensor,
    lse: Tensor,
    chunk: int,
    padded_width: int,
) -> None:
    """Merge the partials of each row's chunks, of `chunk` tokens each, into `out` and `lse`."""
    num_rows, num_heads, width = out.shape
    _merge_chunks_kernel[(num_rows, triton.cdiv(num_heads, _MERGED_ROWS))](
        out_C, lse_C, starts_B, ends_B, out, lse, chunk, num_rows, num_heads,
        WIDTH=width, PADDED_WIDTH=padded_width, HEADS=_MERGED_ROWS,
    )  # fmt: skip


def _check(
    q_BNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_BM: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
    scale: float,
) -> None:
    if q_BNH.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q is {q_BNH.dtype}: float32, float16 or bfloat16 is needed")
    if q_BNH.dtype == torch.bfloat16 and q_BNH.device.type != "cuda":
        raise ValueError("bfloat16 needs a CUDA device: Triton's interpreter cannot multiply it")
    if not q_BNH.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q is {q_BNH.dtype}, the cache {k_cache.dtype} and {v_cache.dtype}")
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != q_BNH.shape[2]:
        raise ValueError(
            f"q {tuple(q_BNH.shape)}, caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("the elements of a cached head must be neighbours in memory")
    if q_BNH.shape[2] > 256:
        raise ValueError(f"head width {q_BNH.shape[2]}: the kernel has tiles for 1 to 256")
    if k_cache.shape[2] and q_BNH.shape[1] % k_cache.shape[2]:
        raise ValueError(f"{q_BNH.shape[1]} query heads are no multiple of {k_cache.shape[2]}")
    if not len(q_BNH) == len(block_table_BM) == len(starts_B) == len(ends_B):
        raise ValueError(
            f"rows: q has {len(q_BNH)}, block table {len(block_table_BM)}, "
            f"starts {len(starts_B)}, ends {len(ends_B)}"
        )
    if not scale > 0:
        raise ValueError(f"scale {scale}: the kernel needs a positive one")


# Numbers that change from step to step are not specialized: each new
# one would compile the kernel again.
@triton.jit(do_not_specialize=["num_rows", "chunk_tokens", "table_stride_b"])
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    starts,
    ends,
    out,
    lse,
    scale,
    chunk_tokens,
    num_rows,
    num_heads,
    q_stride_b,
    q_stride_n,
    k_stride_block,
    k_stride_slot,
    k_stride_k,
    v_stride_block,
    v_stride_slot,
    v_stride_k,
    table_stride_b,
    table_stride_m,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    start, stop = tl.load(starts + row), tl.load(ends + row)
    begin = start + chunk * chunk_tokens
    end = tl.minimum(stop, begin + chunk_tokens)

    g_G = tl.arange(0, PADDED_GROUP)
    h_H = tl.arange(0, PADDED_WIDTH)
    j_J = tl.arange(0, TOKENS)
    head_G = kv_head * GROUP + g_G
    inside_H = h_H < WIDTH
    inside_GH = (g_G < GROUP)[:, None] & inside_H[None, :]
    q_GH = tl.load(
        q + row * q_stride_b + (head_G * q_stride_n)[:, None] + h_H[None, :],
        mask=inside_GH,
        other=0.0,
    )
    acc_GH = tl.zeros([PADDED_GROUP, PADDED_WIDTH], dtype=tl.float32)
    max_G = tl.full([PADDED_GROUP], float("-inf"), dtype=tl.float32)
    sum_G = tl.zeros([PADDED_GROUP], dtype=tl.float32)
    table = block_table + row * table_stride_b
    for j in range(begin, end, TOKENS):
        token_J = j + j_J
        # Neither entries nor slots past the end are read: they may be
        # any sequence's and hold anything.
        inside_J = token_J < end
        block_J = tl.load(table + token_J // BLOCK_SIZE * table_stride_m, mask=inside_J, other=0)
        block_J, slot_J = block_J.to(tl.int64), (token_J % BLOCK_SIZE).to(tl.int64)
        inside_JH = inside_J[:, None] & inside_H[None, :]
        k_at_J = block_J * k_stride_block + slot_J * k_stride_slot + kv_head * k_stride_k
        v_at_J = block_J * v_stride_block + slot_J * v_stride_slot + kv_head * v_stride_k
        k_JH = tl.load(k_cache + k_at_J[:, None] + h_H[None, :], mask=inside_JH, other=0.0)
        v_JH = tl.load(v_cache + v_at_J[:, None] + h_H[None, :], mask=inside_JH, other=0.0)
        acc_GH, max_G, sum_G = _accumulate(
            acc_GH, max_G, sum_G, q_GH, k_JH, v_JH, inside_J, scale, PRECISION
        )

    out_GH, lse_G = end_softmax(acc_GH, max_G, sum_G)
    # A row's chunks past its end are not merged; the first one is also the result of an empty row.
    written = (begin < end) | (chunk == 0)
    at_G = (chunk * num_rows + row) * num_heads + head_G
    tl.store(
        out + (at_G * WIDTH)[:, None] + h_H[None, :],
        out_GH.to(out.dtype.element_ty),
        mask=inside_GH & written,
    )
    tl.store(lse + at_G, lse_G, mask=(g_G < GROUP) & written)


@triton.jit
def _accumulate(acc_GH, max_G, sum_G, q_GH, k_JH, v_JH, inside_J, scale, PRECISION: tl.constexpr):
    """Running softmax after the tokens of one more tile, the first of which is always visible."""
    score_GJ = tl.dot(q_GH, tl.trans(k_JH), input_precision=PRECISION) * scale
    score_GJ = tl.where(inside_J[None, :], score_GJ, float("-inf"))
    # One token is visible, so the maximum is finite.
    new_max_G = tl.maximum(max_G, tl.max(score_GJ, 1))
    weight_GJ = tl.exp2(score_GJ - new_max_G[:, None])
    decay_G = tl.exp2(max_G - new_max_G)
    sum_G = sum_G * decay_G + tl.sum(weight_GJ, 1)
    acc_GH = acc_GH * decay_G[:, None]
    acc_GH = tl.dot(weight_GJ.to(v_JH.dtype), v_JH, acc_GH, input_precision=PRECISION)
    return acc_GH, new_max_G, sum_G


@triton.jit(do_not_specialize=["num_rows", "chunk_tokens"])
def _merge_chunks_kernel(
    out_C,
    lse_C,
    starts,
    ends,
    out,
    lse,
    chunk_tokens,
    num_rows,
    num_heads,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head_R = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    h_H = tl.arange(0, PADDED_WIDTH)
    num_tokens = tl.load(ends + row) - tl.load(starts + row)
    num_chunks = (tl.maximum(num_tokens, 1) + chunk_tokens - 1) // chunk_tokens
    inside_R = head_R < num_heads
    inside_RH = inside_R[:, None] & (h_H < WIDTH)[None, :]
    at_R = row * num_heads + head_R
    at_RH = (at_R * WIDTH)[:, None] + h_H[None, :]
    lse_stride_c = tl.cast(num_rows, tl.int64) * num_heads
    merged_RH, lse_R = merge_rows(
        out_C,
        lse_C,
        num_chunks,
        lse_stride_c * WIDTH,
        lse_stride_c,
        at_RH,
        at_R,
        inside_R,
        inside_RH,
    )
    tl.store(out + at_RH, merged_RH.to(out.dtype.element_ty), mask=inside_RH)
    tl.store(lse + at_R, lse_R, mask=inside_R)
