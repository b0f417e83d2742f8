"""Attention of a prefill step on one rank: keep the new keys and values, then let the transport
attend.

Keys that the cache holds of these sequences from before are read back in front of the new ones,
which is the order that `PrefillLayout.keys` describes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.attention.step import Rotation, keep
from sps2_mega.attention.transports.base import Transport
from sps2_mega.kv_cache.pool import KVPool


class PrefillAttention:
    """One step's attention over the tokens being prefilled; called once per layer, in layer order.

    `slots_T` are the cache slots of this rank's new tokens, `cached_slots_C` those of its cached
    ones.
    """

    def __init__(
        self, pool: KVPool, slots_T: Tensor, cached_slots_C: Tensor, transport: Transport
    ) -> None:
        self._pool, self._slots_T, self._transport = pool, slots_T, transport
        self._cached_slots_C = cached_slots_C

    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rule: SoftmaxParams,
        rotation: Rotation | None = None,
    ) -> Tensor:
        cache = self._pool.layer(layer)
        keep(cache, q_TNH, k_TKH, v_TKH, self._slots_T, rotation)
        k_CKH, v_CKH = k_TKH, v_TKH
        if len(self._cached_slots_C):
            k_CKH, v_CKH = (
                torch.cat([pages.flatten(0, 1).index_select(0, self._cached_slots_C), new])
                for pages, new in zip(cache, (k_TKH, v_TKH), strict=True)
            )
        return self._transport.attend(layer, q_TNH, k_CKH, v_CKH, rule)
