"""Reordering of tokens from rank-major order, in which they arrive, to sequence order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sps2_mega.attention.layout.token_layout import TokenLayout


def sequence_index(layout: TokenLayout, device: torch.device) -> Tensor | None:
    """Return `layout.rank_major_index` as a tensor; None where the orders agree."""
    index = layout.rank_major_index()
    return None if index is None else torch.from_numpy(index).to(device)


def reorder(x: Tensor, index: Tensor | None) -> Tensor:
    """Return x [S, ...] with rows in the order of `index`; x itself without one."""
    return x if index is None else x.index_select(0, index)
