"""Attention of a decode step: keys and values stay where they are, queries move (pass-Q).

Each sequence's linear layers run on the rank that holds its last block, so the new key and value are
written locally. Then, per layer:

    all-gather q of all sequences -> every rank attends over the tokens it holds -> (out, lse) go back to
    the sequence's rank in one exchange -> merge by LSE
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sps2_mega.attention.partials import bring_home
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.comm.collectives import all_gather_rows
from sps2_mega.kernels.paged_decode.sdpa import Bucket, paged_decode
from sps2_mega.kernels.paged_kv.reference import append
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.parallel.groups import Group


class DecodeAttention:
    """One step's attention of one new token per sequence.

    `counts[r]` sequences have their linear layers on sp rank r; the step's order is rank by rank.
    `buckets` describe what this rank holds of every sequence of the step; the sliding window, if any, is
    already in them.
    """

    def __init__(
        self,
        pool: KVPool,
        slots_T: Tensor,
        buckets: Sequence[Bucket],
        counts: Sequence[int],
        group: Group,
    ) -> None:
        self._pool, self._slots_T, self._buckets = pool, slots_T, buckets
        self._counts, self._group = counts, group

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, rule: ScoreRule
    ) -> Tensor:
        k_cache, v_cache = self._pool.layer(layer)
        append(k_cache, v_cache, k_TKH, v_TKH, self._slots_T)
        q_BNH = all_gather_rows(q_TNH, self._counts, self._group)
        out_BNH, lse_BN = paged_decode(q_BNH, k_cache, v_cache, self._buckets, scale=rule.scale)
        return bring_home(out_BNH, lse_BN, self._counts, self._group)
