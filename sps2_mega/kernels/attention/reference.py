"""Causal attention of a run of queries over a run of keys: the slow, obviously correct form."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Causal attention of consecutive queries over consecutive keys.

    Query i sees key j if j <= i and, with a window w, j > i - w.
    Query head n uses key head n // (N/K).

    Args:
        q_TNH: [T, N, H].
        k_SKH, v_SKH: [S, K, H].
        scale: factor of the scores.
        q_start: position of query 0, in tokens.
        k_start: position of key 0, in tokens.
        window: sliding window in tokens; None for none.

    Returns:
    out [T, N, H] in q's type and lse [T, N] float32 (natural log);
    0 and -inf without a visible key.
    """
    num_q, num_k = q_TNH.shape[0], k_SKH.shape[0]
    repeats = q_TNH.shape[1] // k_SKH.shape[1]
    k_SNH = k_SKH.float().repeat_interleave(repeats, 1)
    v_SNH = v_SKH.float().repeat_interleave(repeats, 1)
    scores_NTS = torch.einsum("tnh,snh->nts", q_TNH.float() * scale, k_SNH)
    q_pos = torch.arange(q_start, q_start + num_q, device=q_TNH.device)[:, None]
    k_pos = torch.arange(k_start, k_start + num_k, device=q_TNH.device)[None, :]
    visible_TS = k_pos <= q_pos
    if window is not None:
        visible_TS &= k_pos > q_pos - window
    scores_NTS = scores_NTS.masked_fill(~visible_TS, -torch.inf)
    lse_NT = torch.logsumexp(scores_NTS, -1)
    weights_NTS = torch.exp(scores_NTS - lse_NT.masked_fill(lse_NT == -torch.inf, 0.0)[..., None])
    out_TNH = torch.einsum("nts,snh->tnh", weights_NTS, v_SNH)
    return out_TNH.to(q_TNH.dtype), lse_NT.T.contiguous()
