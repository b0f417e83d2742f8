"""Attention of a step that prefills some sequences and decodes others: each kind for its own
tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.attention.decode import DecodeAttention
from sps2_mega.attention.prefill import PrefillAttention
from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.attention.step import Rotation


class HybridAttention:
    """The first `num_prefill_tokens` of this rank's tokens are being prefilled, one each of the
    rest decodes. Either may be none on a rank; it still takes part in the collectives of both."""

    def __init__(
        self, prefill: PrefillAttention, decode: DecodeAttention, num_prefill_tokens: int
    ) -> None:
        self._prefill, self._decode, self._split = prefill, decode, num_prefill_tokens

    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rule: SoftmaxParams,
        rotation: Rotation | None = None,
    ) -> Tensor:
        new, one_each = slice(None, self._split), slice(self._split, None)
        return torch.cat(
            [
                kind.attend(
                    layer,
                    q_TNH[part],
                    k_TKH[part],
                    v_TKH[part],
                    rule,
                    None if rotation is None else rotation.rows(part),
                )
                for kind, part in ((self._prefill, new), (self._decode, one_each))
            ]
        )
