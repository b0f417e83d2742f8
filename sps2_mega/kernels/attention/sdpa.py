"""Causal attention of a run of queries over a run of keys, on torch's fused kernels with LSE.

A run never needs a T x S mask: keys before the first query form a full rectangle, later keys a
causal square, and the two partials merge by LSE. Only a sliding window masks, tile by tile:

    keys ->  k_start      q_start      q_end
    queries  [ rectangle  ][ triangle  ]          no window
             tile t:    [ window | band]          window: a mask of (tile x (tile + window))
"""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.kernels.attention import choice
from sps2_mega.kernels.lse.reference import merge_two

_WINDOW_TILE = 256


def attend_run(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    *,
    scale: float,
    q_start: int,
    k_start: int = 0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of consecutive queries over consecutive keys, as `reference.attend_run`.

    Args:
        q_TNH: [T, N, H].
        k_SKH, v_SKH: [S, K, H].
        scale: factor of the scores.
        q_start: position of query 0, in tokens.
        k_start: position of key 0, at or before the first query's window.
        window: sliding window in tokens; None for none.
    """
    num_q, num_k = q_TNH.shape[0], k_SKH.shape[0]
    visible_end = min(num_k, q_start + num_q - k_start)
    if num_q == 0 or visible_end <= 0:
        return _nothing(q_TNH)
    if window is not None and window < q_start + num_q - k_start:
        return _attend_window(
            q_TNH, k_SKH, v_SKH, scale=scale, q_start=q_start, k_start=k_start, window=window
        )
    before = min(q_start - k_start, num_k)
    if before < 0:
        raise ValueError(f"keys begin at {k_start}, after the first query at {q_start}")
    if before == visible_end:
        return attend_dense(q_TNH, k_SKH[:before], v_SKH[:before], scale=scale, causal=False)
    if visible_end - before != num_q:
        raise ValueError(
            f"keys end inside the query run: {num_k} keys from {k_start}, {num_q} queries from "
            f"{q_start}"
        )
    square = slice(before, visible_end)
    triangle = attend_dense(q_TNH, k_SKH[square], v_SKH[square], scale=scale, causal=True)
    if before == 0:
        return triangle
    rectangle = attend_dense(q_TNH, k_SKH[:before], v_SKH[:before], scale=scale, causal=False)
    return merge_two(*rectangle, *triangle)


def attend_dense(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Full (any T, S) or causal (T == S) attention -> out [T, N, H], lse [T, N] float32."""
    if q_TNH.shape[0] == 0 or k_SKH.shape[0] == 0:
        return _nothing(q_TNH)
    return _fused(q_TNH, k_SKH, v_SKH, scale=scale, causal=causal, bias_TS=None)


def _nothing(q_TNH: Tensor) -> tuple[Tensor, Tensor]:
    lse_TN = torch.full(q_TNH.shape[:2], -torch.inf, device=q_TNH.device)
    return torch.zeros_like(q_TNH), lse_TN


def _attend_window(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    *,
    scale: float,
    q_start: int,
    k_start: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for begin in range(0, q_TNH.shape[0], _WINDOW_TILE):
        tile = q_TNH[begin : begin + _WINDOW_TILE]
        first, last = q_start + begin, q_start + begin + tile.shape[0]
        low = max(first - window + 1, k_start) - k_start
        high = min(last - k_start, k_SKH.shape[0])
        if high <= low:
            out, lse = _nothing(tile)
        else:
            q_pos = torch.arange(first, last, device=tile.device)[:, None]
            k_pos = torch.arange(low + k_start, high + k_start, device=tile.device)[None, :]
            hidden_TS = (k_pos > q_pos) | (k_pos <= q_pos - window)
            bias_TS = tile.new_zeros(hidden_TS.shape).masked_fill_(hidden_TS, -torch.inf)
            out, lse = _fused(
                tile, k_SKH[low:high], v_SKH[low:high], scale=scale, causal=False, bias_TS=bias_TS
            )
            # The fused kernels return 0 for a row without keys; the convention here is -inf.
            lse = lse.masked_fill(hidden_TS.all(1)[:, None], -torch.inf)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _fused(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    *,
    scale: float,
    causal: bool,
    bias_TS: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_SKH, v_SKH))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias_TS, scale=scale
        )
    else:
        out, lse = _fused_cuda(q, k, v, scale=scale, causal=causal, bias_TS=bias_TS)
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0).transpose(0, 1).float()


def _fused_cuda(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, bias_TS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The fastest library for 16-bit types without bias, else memory-efficient attention."""
    if bias_TS is None and q.dtype in (torch.float16, torch.bfloat16):
        return choice.attend_fastest(q, k, v, scale=scale, causal=causal)
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    bias = None
    if bias_TS is not None:
        # The kernel needs rows aligned to 16 bytes: allocate wider, then slice.
        rows, columns = bias_TS.shape
        wide = bias_TS.new_zeros(rows, -(-columns // 8) * 8)
        wide[:, :columns] = bias_TS
        bias = wide[:, :columns].expand(1, q.shape[1], rows, columns)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, causal, scale=scale
    )[:2]
    return out, lse[..., : q.shape[2]]
