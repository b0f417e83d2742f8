"""Partial attention results: add them up, or return them to the ranks that own the queries.

A partial is (out, lse) of attention over some of the keys. Partials travel as bytes in one
exchange: out in its own type and lse in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sps2_mega.comm.collectives import all_to_all_flat
from sps2_mega.comm.exchange import Pending, post_all_to_all
from sps2_mega.kernels.lse.dispatch import merge, merge_two

if TYPE_CHECKING:
    from sps2_mega.parallel.groups import Group

_ALL = slice(None)


class PartialSum:
    """Running sum, by LSE, of partials of queries [T, N, H].

    It is float32, as rounding once per partial would grow with their number. Rows and heads that
    nothing was added to are 0, with lse -inf.
    """

    def __init__(self, like_TNH: Tensor) -> None:
        self._dtype = like_TNH.dtype
        self._out_TNH = torch.zeros(like_TNH.shape, dtype=torch.float32, device=like_TNH.device)
        self._lse_TN = torch.full(
            like_TNH.shape[:2], -torch.inf, dtype=torch.float32, device=like_TNH.device
        )

    def add(
        self, out_tnH: Tensor, lse_tn: Tensor, *, rows: slice = _ALL, heads: slice = _ALL
    ) -> None:
        """Add a partial of some queries (`rows`) and some of their heads."""
        out, lse = self._out_TNH[rows, heads], self._lse_TN[rows, heads]
        self._out_TNH[rows, heads], self._lse_TN[rows, heads] = merge_two(out, lse, out_tnH, lse_tn)

    def add_single_rows(self, rows: Sequence[Tensor], out_RH: Tensor, lse_R: Tensor) -> None:
        """Add partials of single (token, head) rows, set after set.

        No row occurs twice within a set. `out_RH` and `lse_R` hold the sets one after another.
        """
        flat_out, flat_lse = self._out_TNH.flatten(0, 1), self._lse_TN.flatten()
        counts = [len(numbers) for numbers in rows]
        for numbers, out, lse in zip(rows, out_RH.split(counts), lse_R.split(counts), strict=True):
            if len(numbers):
                merged = merge_two(flat_out[numbers], flat_lse[numbers], out, lse)
                flat_out[numbers], flat_lse[numbers] = merged

    def result(self) -> Tensor:
        """Return the attention [T, N, H] in the type of the queries."""
        return self._out_TNH.to(self._dtype)

    def partial(self) -> tuple[Tensor, Tensor]:
        """Return (out in the type of the queries, lse in float32), to be merged elsewhere."""
        return self.result(), self._lse_TN


def return_partials(out_BNH: Tensor, lse_BN: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Return partials over this rank's keys to the owners of their queries, and merge ours.

    Rows are the queries of all ranks, rank by rank, `counts[r]` of rank r; the result has this
    rank's rows [counts[rank], N, H].
    """
    if group.size == 1:
        return out_BNH
    packed = _packed(out_BNH, lse_BN)
    received = all_to_all_flat(packed.flatten(), *_sizes(packed, counts, group), group)
    return merge_partials(received, out_BNH, group)


def post_partials(out_BNH: Tensor, lse_BN: Tensor, counts: Sequence[int], group: Group) -> Pending:
    """Post `return_partials` beside the computation; `merge_partials` takes what arrives."""
    packed = _packed(out_BNH, lse_BN)
    return post_all_to_all(packed.flatten(), *_sizes(packed, counts, group), group)


def merge_partials(received: Tensor, like_BNH: Tensor, group: Group) -> Tensor:
    """Merge the bytes of all ranks' partials of this rank's rows -> [T, N, H].

    `like_BNH` gives the type and the heads.
    """
    heads, width = like_BNH.shape[1:]
    packed = received.view(group.size, -1, heads, width * like_BNH.itemsize + 4)
    out_PTNH = packed[..., :-4].contiguous().view(like_BNH.dtype)
    lse_PTN = packed[..., -4:].contiguous().view(torch.float32).squeeze(-1)
    return merge(out_PTNH, lse_PTN)[0]


def _packed(out_BNH: Tensor, lse_BN: Tensor) -> Tensor:
    """Pack outputs and LSEs as bytes: [B, N, bytes of an output and its lse]."""
    out_bytes = out_BNH.contiguous().view(torch.uint8)
    lse_bytes = lse_BN.unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat([out_bytes, lse_bytes], -1)


def _sizes(packed: Tensor, counts: Sequence[int], group: Group) -> tuple[list[int], list[int]]:
    """Return the bytes to send to each rank, and to receive from each."""
    row = packed.shape[1] * packed.shape[2]
    return [count * row for count in counts], [counts[group.rank] * row] * group.size
