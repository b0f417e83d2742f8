"""One-token attention over listed cache slots, per KV head: only those rows of the cache are read.

Rows of similar counts are gathered together and share one fused call, as in `paged_decode.sdpa`.
The heads of a row see about equally many slots, so little is padded among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps2_mega.kernels.paged_decode.sdpa import bucket_rows


@dataclass(frozen=True, slots=True)
class SlotBatch:
    """Rows computed together; `rows_B` is None if the batch is all rows in order.

    `index` [b * K * S] counts (slot, KV head) pairs of the cache; `hidden_bKS`
    is True for padding, or None without any.
    """

    rows_B: Tensor | None
    index: Tensor
    hidden_bKS: Tensor | None
    bias_bK1S: Tensor | None
    longest: int


def prepare(
    slots: Sequence[Sequence[np.ndarray]], *, dtype: torch.dtype, device: torch.device
) -> list[SlotBatch]:
    """Batches of rows whose KV head g sees `slots[b][g]` (numpy in, device tensors out)."""
    longest_B = [max(map(len, by_head), default=0) for by_head in slots]
    batches = []
    for rows in bucket_rows(longest_B):
        longest, num_kv_heads = max(longest_B[row] for row in rows), len(slots[rows[0]])
        index = np.empty((len(rows), num_kv_heads, longest), dtype=np.int64)
        counts = np.empty((len(rows), num_kv_heads), dtype=np.int64)
        for place, row in enumerate(rows):
            # Padding is hidden, but multiplied by zero: it must be one of the row's own slots,
            # which is finite or makes the row fail anyway.
            own = next(chosen[0] for chosen in slots[row] if len(chosen))
            for head, chosen in enumerate(slots[row]):
                counts[place, head] = len(chosen)
                index[place, head, : len(chosen)] = chosen
                index[place, head, len(chosen) :] = own
        index = index * num_kv_heads + np.arange(num_kv_heads)[:, None]
        hidden_bKS = bias_bK1S = None
        if counts.min() < longest:
            hidden = np.arange(longest) >= counts[..., None]
            hidden_bKS = torch.from_numpy(hidden).to(device)
            bias_bK1S = torch.zeros(hidden.shape, dtype=dtype, device=device)
            bias_bK1S = bias_bK1S.masked_fill_(hidden_bKS, -torch.inf)[:, :, None, :]
        batches.append(
            SlotBatch(
                rows_B=None if len(rows) == len(slots) else torch.tensor(rows, device=device),
                index=torch.from_numpy(index.reshape(-1)).to(device),
                hidden_bKS=hidden_bKS,
                bias_bK1S=bias_bK1S,
                longest=longest,
            )
        )
    return batches


def slot_decode(
    q_BNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batches: Sequence[SlotBatch],
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One-token attention over prepared batches, as `reference.slot_decode`."""
    if len(batches) == 1 and batches[0].rows_B is None:
        return _attend_batch(q_BNH, k_cache, v_cache, batches[0], scale=scale)
    out = torch.zeros_like(q_BNH)
    lse = torch.full(q_BNH.shape[:2], -torch.inf, device=q_BNH.device)
    for batch in batches:
        rows = batch.rows_B
        assert rows is not None, "a batch of all rows is the only one"
        out_b, lse_b = _attend_batch(
            q_BNH.index_select(0, rows), k_cache, v_cache, batch, scale=scale
        )
        out.index_copy_(0, rows, out_b)
        lse.index_copy_(0, rows, lse_b)
    return out, lse


def _attend_batch(
    q_bNH: Tensor, k_cache: Tensor, v_cache: Tensor, batch: SlotBatch, *, scale: float
) -> tuple[Tensor, Tensor]:
    size, num_heads, head_dim = q_bNH.shape
    num_kv_heads = k_cache.shape[2]
    shape = (size, num_kv_heads, batch.longest, head_dim)
    k, v = (
        cache.view(-1, head_dim).index_select(0, batch.index).view(shape)
        for cache in (k_cache, v_cache)
    )
    q = q_bNH.reshape(size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=batch.bias_bK1S, scale=scale
        )
    else:
        scores = torch.matmul(q.float() * scale, k.float().transpose(2, 3))
        if batch.hidden_bKS is not None:
            scores = scores.masked_fill(batch.hidden_bKS[:, :, None, :], -torch.inf)
        lse = torch.logsumexp(scores, -1)
        out = torch.matmul(torch.exp(scores - lse[..., None]), v.float()).to(q.dtype)
    lse = lse.float()
    if batch.hidden_bKS is not None:
        empty = batch.hidden_bKS.all(-1)[..., None]
        out = out.masked_fill(empty[..., None], 0.0)
        lse = lse.masked_fill(empty, -torch.inf)
    return out.reshape(size, num_heads, head_dim), lse.reshape(size, num_heads)
