"""One-token attention over a block table: the slow, obviously correct form."""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.kernels.attention.reference import attend_run


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
    """One-token attention: row b sees cached tokens [start, end) of its blocks, in table order.

    Args:
        q_BNH: [B, N, H].
        k_cache, v_cache: [blocks, block_size, K, H].
        block_table_BM: [B, M] block ids; entries past a row's end are ignored.
        starts_B, ends_B: [B], in tokens.
        scale: factor of the scores.

    Returns:
    out [B, N, H] in q's type and lse [B, N] float32; a row without tokens gives 0 and -inf.
    """
    out = torch.zeros_like(q_BNH)
    lse = torch.full(q_BNH.shape[:2], -torch.inf, device=q_BNH.device)
    for row in range(q_BNH.shape[0]):
        start, end = int(starts_B[row]), int(ends_B[row])
        if start >= end:
            continue
        k = k_cache[block_table_BM[row]].flatten(0, 1)[start:end]
        v = v_cache[block_table_BM[row]].flatten(0, 1)[start:end]
        out_1, lse_1 = attend_run(q_BNH[row : row + 1], k, v, scale=scale, q_start=end)
        out[row], lse[row] = out_1[0], lse_1[0]
    return out, lse
