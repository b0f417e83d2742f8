"""Attention of a prefill step on one rank: keep the new keys and values, then let the transport attend."""

from __future__ import annotations

from torch import Tensor

from sps2_mega.attention.rule import ScoreRule
from sps2_mega.attention.transports import Transport
from sps2_mega.kernels.paged_kv.reference import append
from sps2_mega.kv_cache.pool import KVPool


class PrefillAttention:
    """One step's attention over the tokens being prefilled; called once per layer, in layer order."""

    def __init__(self, pool: KVPool, slots_T: Tensor, transport: Transport) -> None:
        self._pool, self._slots_T, self._transport = pool, slots_T, transport

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rule: ScoreRule
    ) -> Tensor:
        append(*self._pool.layer(layer), k_TKH, v_TKH, self._slots_T)
        return self._transport.attend(layer, q_TNH, k_TKH, v_TKH, rule)
