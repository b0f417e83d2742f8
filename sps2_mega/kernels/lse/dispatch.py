"""Merge of partials by LSE: one launch on CUDA, torch's operations elsewhere."""

from __future__ import annotations

from torch import Tensor

from sps2_mega.kernels.backend import Backend, choose
from sps2_mega.kernels.lse import reference


def merge(
    out_PTNH: Tensor, lse_PTN: Tensor, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Merge P partials, as `reference.merge`."""
    if choose(out_PTNH.device, backend) is Backend.TRITON:
        from sps2_mega.kernels.lse import triton

        return triton.merge(out_PTNH, lse_PTN)
    return reference.merge(out_PTNH, lse_PTN)


def merge_two(
    out_a_TNH: Tensor,
    lse_a_TN: Tensor,
    out_b_TNH: Tensor,
    lse_b_TN: Tensor,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge two partials, as `reference.merge_two`."""
    if choose(out_a_TNH.device, backend) is Backend.TRITON:
        from sps2_mega.kernels.lse import triton

        return triton.merge_two(out_a_TNH, lse_a_TN, out_b_TNH, lse_b_TN)
    return reference.merge_two(out_a_TNH, lse_a_TN, out_b_TNH, lse_b_TN)
