"""Attention of a prefill step on one rank: keys in the order of the layout, then the transport.

Cached keys of the step's sequences are read back and put in front of the new ones, which is the
order that `PrefillLayout.keys` describes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sps2_mega.attention.transports.base import SoftmaxParams, Transport
    from sps2_mega.kv_cache.pool import KVPool


class PrefillAttention:
    """Attention of one step over the tokens being prefilled, by one transport.

    `cached_slots_C` are the cache slots of this rank's cached tokens of the step's sequences.
    """

    def __init__(self, pool: KVPool, cached_slots_C: Tensor, transport: Transport) -> None:
        self._pool, self._cached_slots_C, self._transport = pool, cached_slots_C, transport

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        k_CKH, v_CKH = k_TKH, v_TKH
        if len(self._cached_slots_C):
            k_CKH, v_CKH = (
                torch.cat([pages.flatten(0, 1).index_select(0, self._cached_slots_C), new])
                for pages, new in zip(self._pool.layer(layer), (k_TKH, v_TKH), strict=True)
            )
        return self._transport.attend(layer, q_TNH, k_CKH, v_CKH, softmax)
