"""One-token attention over a block table, batched: rows of similar length share one fused call.

Padding every row to the longest would mostly read (and multiply) padding when lengths differ, so
rows are put into buckets whose longest row has at most twice the blocks of the shortest. A bucket
is prepared once per step and used by every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows computed together; `rows_B` is None if the bucket is the whole batch in order.

    `blocks` is [b * m] block ids; `hidden_BS` [b, m * block_size] is True for
    invisible slots, or None if every slot is visible.
    """

    rows_B: Tensor | None
    blocks: Tensor
    hidden_BS: Tensor | None
    bias_B11S: Tensor | None
    num_blocks: int


def bucket_rows(num_blocks: Sequence[int]) -> list[list[int]]:
    """Group row numbers so that a group's largest count is at most twice its smallest.

    Rows of count 0 are left out. A group of all rows keeps their order.
    """
    rows = sorted(
        (row for row, count in enumerate(num_blocks) if count), key=num_blocks.__getitem__
    )
    groups: list[list[int]] = []
    for row in rows:
        if groups and num_blocks[row] <= 2 * num_blocks[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]


def prepare(
    block_table_BM: np.ndarray,
    starts_B: np.ndarray,
    ends_B: np.ndarray,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Bucket]:
    """Prepare buckets of rows that see cached tokens [start, end) of their blocks.

    The tables are numpy arrays; the buckets hold device tensors.
    """
    num_blocks_B = -(-ends_B // block_size) * (ends_B > starts_B)
    buckets = []
    for rows in bucket_rows(num_blocks_B.tolist()):
        longest = int(num_blocks_B[rows].max())
        blocks = block_table_BM[rows, :longest]
        # Entries past a row's end may be stale ids. They are replaced by the row's own first block,
        # hidden below, so that a sequence never reads another's values, not even times zero.
        blocks = np.where(np.arange(longest) < num_blocks_B[rows, None], blocks, blocks[:, :1])
        slots = np.arange(longest * block_size)
        hidden = (slots >= ends_B[rows, None]) | (slots < starts_B[rows, None])
        hidden_BS = bias_B11S = None
        if hidden.any():
            hidden_BS = torch.from_numpy(hidden).to(device)
            bias_B11S = torch.zeros(hidden.shape, dtype=dtype, device=device)
            bias_B11S = bias_B11S.masked_fill_(hidden_BS, -torch.inf)[:, None, None, :]
        whole = len(rows) == len(num_blocks_B)
        buckets.append(
            Bucket(
                rows_B=None if whole else torch.tensor(rows, device=device),
                blocks=torch.from_numpy(blocks.reshape(-1).astype(np.int64)).to(device),
                hidden_BS=hidden_BS,
                bias_B11S=bias_B11S,
                num_blocks=longest,
            )
        )
    return buckets


def paged_decode(
    q_BNH: Tensor, k_cache: Tensor, v_cache: Tensor, buckets: Sequence[Bucket], *, scale: float
) -> tuple[Tensor, Tensor]:
    """One-token attention over prepared buckets, as `reference.paged_decode`."""
    if len(buckets) == 1 and buckets[0].rows_B is None:
        return _attend_bucket(q_BNH, k_cache, v_cache, buckets[0], scale=scale)
    out = torch.zeros_like(q_BNH)
    lse = torch.full(q_BNH.shape[:2], -torch.inf, device=q_BNH.device)
    for bucket in buckets:
        rows = bucket.rows_B
        if rows is None:
            return _attend_bucket(q_BNH, k_cache, v_cache, bucket, scale=scale)
        out_b, lse_b = _attend_bucket(
            q_BNH.index_select(0, rows), k_cache, v_cache, bucket, scale=scale
        )
        out.index_copy_(0, rows, out_b)
        lse.index_copy_(0, rows, lse_b)
    return out, lse


def _attend_bucket(
    q_bNH: Tensor, k_cache: Tensor, v_cache: Tensor, bucket: Bucket, *, scale: float
) -> tuple[Tensor, Tensor]:
    size, num_heads, head_dim = q_bNH.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    shape = (size, bucket.num_blocks * block_size, num_kv_heads, head_dim)
    k = k_cache.index_select(0, bucket.blocks).view(shape).transpose(1, 2)  # [b, K, S, H]
    v = v_cache.index_select(0, bucket.blocks).view(shape).transpose(1, 2)
    # Without a causal mask the query heads of one KV head fold into
    # query rows: K and V are read once.
    q = q_bNH.reshape(size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bucket.bias_B11S, scale=scale
        )
    else:
        scores = torch.matmul(q.float() * scale, k.float().transpose(2, 3))
        if bucket.hidden_BS is not None:
            scores = scores.masked_fill(bucket.hidden_BS[:, None, None, :], -torch.inf)
        lse = torch.logsumexp(scores, -1)
        out = torch.matmul(torch.exp(scores - lse[..., None]), v.float()).to(q.dtype)
    return out.reshape(size, num_heads, head_dim), lse.reshape(size, num_heads).float()
