"""Attention of a step that prefills some sequences and decodes others, each kind for its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sps2_mega.attention.step import AttentionKind
    from sps2_mega.attention.transports.base import SoftmaxParams


class HybridAttention:
    """Prefill for the first `num_prefill_tokens` of this rank's tokens, decode for the rest.

    Either part may be empty on a rank, which still takes part in the collectives of both.
    """

    def __init__(
        self, prefill: AttentionKind, decode: AttentionKind, num_prefill_tokens: int
    ) -> None:
        self._prefill, self._decode, self._split = prefill, decode, num_prefill_tokens

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        split = self._split
        prefill_TNH = self._prefill.attend(
            layer, q_TNH[:split], k_TKH[:split], v_TKH[:split], softmax
        )
        decode_TNH = self._decode.attend(
            layer, q_TNH[split:], k_TKH[split:], v_TKH[split:], softmax
        )
        return torch.cat([prefill_TNH, decode_TNH])
