"""Merge of attention partials by their log-sum-exp.

A partial is `(out, lse)` of softmax attention over part of the keys. With `m = max lse_p`: out =
sum_p exp(lse_p - m) out_p / sum_p exp(lse_p - m). A partial without keys has lse = -inf, out = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_PTNH: Tensor, lse_PTN: Tensor) -> tuple[Tensor, Tensor]:
    """Merge P partials: out [P, T, N, H], lse [P, T, N] float32 -> ([T, N, H], [T, N]).

    `out` has any float type, which is also the result's; weights and sum are float32.
    """
    if out_PTNH.shape[0] == 1:
        return out_PTNH[0], lse_PTN[0]
    lse_TN = torch.logsumexp(lse_PTN, dim=0)
    # -inf - -inf is NaN: a row that sees no key anywhere keeps weight 0 for every partial.
    weights_PTN = torch.exp(lse_PTN - lse_TN.masked_fill(lse_TN == -torch.inf, 0.0))
    merged_TNH = torch.einsum("ptn,ptnh->tnh", weights_PTN, out_PTNH.float())
    return merged_TNH.to(out_PTNH.dtype), lse_TN


def merge_two(
    out_a_TNH: Tensor, lse_a_TN: Tensor, out_b_TNH: Tensor, lse_b_TN: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge two partials without stacking them."""
    lse_TN = torch.logaddexp(lse_a_TN, lse_b_TN)
    finite_TN = lse_TN.masked_fill(lse_TN == -torch.inf, 0.0)
    out_TNH = out_a_TNH.float() * torch.exp(lse_a_TN - finite_TN).unsqueeze(-1)
    out_TNH += out_b_TNH.float() * torch.exp(lse_b_TN - finite_TN).unsqueeze(-1)
    return out_TNH.to(out_a_TNH.dtype), lse_TN
