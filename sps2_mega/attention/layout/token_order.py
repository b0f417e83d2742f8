"""Bringing tokens from the order in which they arrive (rank after rank) into sequence order."""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.attention.layout.token_layout import TokenLayout


def sequence_index(layout: TokenLayout, device: torch.device) -> Tensor | None:
    """`layout.rank_major_index` as a tensor; None when nothing has to move."""
    index = layout.rank_major_index()
    return None if index is None else torch.from_numpy(index).to(device)


def reorder(x: Tensor, index: Tensor | None) -> Tensor:
    """x [S, ...] with rows taken in the order of `index`; x itself without one."""
    return x if index is None else x.index_select(0, index)
