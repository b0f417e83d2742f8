"""Adding up partial attention of one rank's queries as it comes in, over all heads, some heads or
single rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps2_mega.kernels.lse.dispatch import merge_two


class PartialSum:
    """Attention of queries [T, N, H] in float32; rounding once per partial would grow with their
    number. Heads and rows that nothing was added to are 0."""

    def __init__(self, like_TNH: Tensor) -> None:
        self._dtype = like_TNH.dtype
        self._out_TNH = torch.zeros(like_TNH.shape, device=like_TNH.device)
        self._lse_TN = torch.full(like_TNH.shape[:2], -torch.inf, device=like_TNH.device)

    def add(self, heads: slice, out_TnH: Tensor, lse_Tn: Tensor) -> None:
        """A partial of all queries, for some heads."""
        out, lse = self._out_TNH[:, heads], self._lse_TN[:, heads]
        self._out_TNH[:, heads], self._lse_TN[:, heads] = merge_two(out, lse, out_TnH, lse_Tn)

    def add_rows(self, rows: Sequence[Tensor], out_RH: Tensor, lse_R: Tensor) -> None:
        """Partials of single (token, head) rows, set after set; within a set no row occurs
        twice."""
        flat_out, flat_lse = self._out_TNH.flatten(0, 1), self._lse_TN.flatten()
        counts = [len(numbers) for numbers in rows]
        for numbers, out, lse in zip(rows, out_RH.split(counts), lse_R.split(counts), strict=True):
            if len(numbers):
                merged = merge_two(flat_out[numbers], flat_lse[numbers], out, lse)
                flat_out[numbers], flat_lse[numbers] = merged

    def result(self) -> Tensor:
        return self._out_TNH.to(self._dtype)
