"""Bringing partial attention results home: each rank attended over the keys it holds, the owner
merges.

Partials travel as bytes in one exchange: out in its own type and lse in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps2_mega.comm.collectives import all_to_all_flat
from sps2_mega.comm.exchange import Pending, post_all_to_all
from sps2_mega.kernels.lse.dispatch import merge
from sps2_mega.parallel.groups import Group


def return_partials(out_BNH: Tensor, lse_BN: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Rows of all ranks' queries, rank by rank (`counts[r]` of rank r), over this rank's keys
    -> this rank's rows [counts[rank], N, H] over all ranks' keys."""
    if group.size == 1:
        return out_BNH
    packed = _packed(out_BNH, lse_BN)
    received = all_to_all_flat(packed.flatten(), *_sizes(packed, counts, group), group)
    return merge_partials(received, out_BNH, group)


def post_partials(out_BNH: Tensor, lse_BN: Tensor, counts: Sequence[int], group: Group) -> Pending:
    """The same beside the computation; what arrives is for `merge_partials`."""
    packed = _packed(out_BNH, lse_BN)
    return post_all_to_all(packed.flatten(), *_sizes(packed, counts, group), group)


def merge_partials(received: Tensor, like_BNH: Tensor, group: Group) -> Tensor:
    """Bytes of all ranks' partials of this rank's rows -> [T, N, H], of the type and heads of
    `like_BNH`."""
    heads, width = like_BNH.shape[1:]
    packed = received.view(group.size, -1, heads, width * like_BNH.itemsize + 4)
    out_PTNH = packed[..., :-4].contiguous().view(like_BNH.dtype)
    lse_PTN = packed[..., -4:].contiguous().view(torch.float32).squeeze(-1)
    return merge(out_PTNH, lse_PTN)[0]


def _packed(out_BNH: Tensor, lse_BN: Tensor) -> Tensor:
    """[B, N, bytes of an output and its lse]."""
    out_bytes = out_BNH.contiguous().view(torch.uint8)
    lse_bytes = lse_BN.unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat([out_bytes, lse_bytes], -1)


def _sizes(packed: Tensor, counts: Sequence[int], group: Group) -> tuple[list[int], list[int]]:
    """Bytes to send to each rank, and to receive from each."""
    row = packed.shape[1] * packed.shape[2]
    return [count * row for count in counts], [counts[group.rank] * row] * group.size
