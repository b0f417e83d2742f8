"""Bringing partial attention results home: each rank attended over the keys it holds, the owner merges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps2_mega.comm.collectives import all_to_all_flat
from sps2_mega.kernels.lse.dispatch import merge
from sps2_mega.parallel.groups import Group


def bring_home(out_BNH: Tensor, lse_BN: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Rows of all ranks' queries, rank by rank (`counts[r]` of rank r), over this rank's keys
    -> this rank's rows [counts[rank], N, H] over all ranks' keys.

    Partials travel as bytes in one exchange: out in its own type and lse in float32.
    """
    if group.size == 1:
        return out_BNH
    heads = out_BNH.shape[1]
    out_bytes = out_BNH.contiguous().view(torch.uint8)
    lse_bytes = lse_BN.unsqueeze(-1).contiguous().view(torch.uint8)
    packed = torch.cat([out_bytes, lse_bytes], -1)
    row = heads * packed.shape[-1]
    mine = counts[group.rank]
    received = all_to_all_flat(
        packed.flatten(), [count * row for count in counts], [mine * row] * group.size, group
    ).view(group.size, mine, heads, packed.shape[-1])
    out_PTNH = received[..., :-4].contiguous().view(out_BNH.dtype)
    lse_PTN = received[..., -4:].contiguous().view(torch.float32).squeeze(-1)
    return merge(out_PTNH, lse_PTN)[0]
