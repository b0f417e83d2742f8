"""Communication-efficient sparse attention: slow, obviously correct forms with a full mask.

`attend_csa` follows the definition, `attend_pieces` a list of pieces, both in
float32; the fast forms of the latter must equal both. Shapes: T queries, S
keys, N query heads, K KV heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps2_mega.kernels.csa.piece import Piece


def attend_csa(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    *,
    scale: float,
    degrees: Sequence[int],
    spans: Sequence[int],
    sinks: int,
    halo: int,
    exact_from: int,
    sample_queries: bool,
    block: int = 1,
    layer: int,
    first_kv_head: int = 0,
    q_start: int = 0,
    k_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sparse attention of consecutive queries over consecutive keys, by the pattern's definition.

    Args:
        q_TNH: [T, N, H].
        k_SKH, v_SKH: [S, K, H].
        scale: factor of the scores.
        degrees: sparsity degree of each level, innermost first.
        spans: tokens of a cell of each level but the last, which spans everything.
        sinks: tokens at the start that every query sees.
        halo: tokens before a query's own cell that it sees.
        exact_from: position from which on queries see all keys.
        sample_queries: whether only every degree-th query of a KV head sees a level's keys.
        block: consecutive keys that are kept or dropped together, in tokens.
        layer: number of the layer, which shifts the kept keys.
        first_kv_head: number of KV head 0 over all ranks.
        q_start: position of query 0, in tokens.
        k_start: position of key 0, in tokens.

    Returns:
    out [T, N, H] in q's type and lse [T, N] float32 (natural log);
    0 and -inf without a visible key.
    """
    i_T1 = torch.arange(q_start, q_start + q_TNH.shape[0], device=q_TNH.device)[:, None]
    j_1S = torch.arange(k_start, k_start + k_SKH.shape[0], device=q_TNH.device)[None, :]
    own_T1 = i_T1 // spans[0] * spans[0] if spans else torch.zeros_like(i_T1)
    always_TS = (i_T1 >= exact_from) | (j_1S < sinks)
    always_TS = always_TS | ((j_1S >= own_T1 - halo) & (j_1S < own_T1))

    visible = []
    for g in range(first_kv_head, first_kv_head + k_SKH.shape[1]):
        seen_TS = always_TS.clone()
        inner_TS = torch.zeros_like(always_TS)  # pairs already joined by a smaller level
        for level, degree in enumerate(degrees):
            joined_TS = torch.ones_like(inner_TS)
            if level < len(spans):
                joined_TS = i_T1 // spans[level] == j_1S // spans[level]
            kept_TS = (j_1S // block % degree == (g + layer) % degree).expand_as(inner_TS)
            if sample_queries:
                kept_TS = kept_TS & (i_T1 % degree == g % degree)
            seen_TS |= joined_TS & ~inner_TS & kept_TS
            inner_TS |= joined_TS
        visible.append(seen_TS & (j_1S <= i_T1))
    return _attend_mask(q_TNH, k_SKH, v_SKH, torch.stack(visible), scale=scale)


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
    """Attention over the union of disjoint pieces.

    Args:
        q_TNH: [T, N, H].
        k_SKH, v_SKH: [S, K, H].
        pieces: disjoint pieces; their ranges are positions in tokens, their KV heads those of k.
        scale: factor of the scores.
        q_start: position of row 0 of q.
        k_start: position of row 0 of k and v.

    Returns:
    out [T, N, H] in q's type and lse [T, N] float32 (natural log);
    0 and -inf without a visible key.
    """
    count = torch.zeros(k_SKH.shape[1], q_TNH.shape[0], k_SKH.shape[0], dtype=torch.int64)
    for piece in pieces:
        keys = torch.tensor(piece.keys) - k_start
        for head in piece.kv_heads:
            for t, i in enumerate(piece.queries):
                count[head, i - q_start, keys[: t + 1] if piece.causal else keys] += 1
    assert count.max() <= 1 if count.numel() else True, "pieces overlap"
    return _attend_mask(q_TNH, k_SKH, v_SKH, count.bool().to(q_TNH.device), scale=scale)


def _attend_mask(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, visible_KTS: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    repeats = q_TNH.shape[1] // k_SKH.shape[1]
    visible_NTS = visible_KTS.repeat_interleave(repeats, 0)
    k_SNH = k_SKH.float().repeat_interleave(repeats, 1)
    v_SNH = v_SKH.float().repeat_interleave(repeats, 1)
    scores_NTS = torch.einsum("tnh,snh->nts", q_TNH.float() * scale, k_SNH)
    scores_NTS = scores_NTS.masked_fill(~visible_NTS, -torch.inf)
    lse_NT = torch.logsumexp(scores_NTS, -1)
    weights_NTS = torch.exp(scores_NTS - lse_NT.masked_fill(lse_NT == -torch.inf, 0.0)[..., None])
    out_TNH = torch.einsum("nts,snh->tnh", weights_NTS, v_SNH)
    return out_TNH.to(q_TNH.dtype), lse_NT.T.contiguous()
