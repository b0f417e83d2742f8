"""One-token attention over listed cache slots, per KV head: the slow, obviously correct form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slot_decode(
    q_BNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Sequence[Sequence[Tensor]],
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One-token attention: row b's query heads of KV head g see the tokens in `slots[b][g]` only.

    Args:
        q_BNH: [B, N, H].
        k_cache, v_cache: [blocks, block_size, K, H]; slot = block * block_size + offset.
        slots: [B][K] integer vectors of any lengths.

    Returns:
    out [B, N, H] in q's type and lse [B, N] float32; a head without slots gives 0 and -inf.
    """
    out = torch.zeros_like(q_BNH)
    lse = torch.full(q_BNH.shape[:2], -torch.inf, device=q_BNH.device)
    repeats = q_BNH.shape[1] // k_cache.shape[2]
    for row, by_head in enumerate(slots):
        for head, chosen in enumerate(by_head):
            if not len(chosen):
                continue
            k_SH = k_cache.flatten(0, 1)[chosen, head].float()
            v_SH = v_cache.flatten(0, 1)[chosen, head].float()
            queries = slice(head * repeats, (head + 1) * repeats)
            scores_nS = q_BNH[row, queries].float() * scale @ k_SH.T
            lse[row, queries] = torch.logsumexp(scores_nS, -1)
            out[row, queries] = (torch.softmax(scores_nS, -1) @ v_SH).to(out.dtype)
    return out, lse
