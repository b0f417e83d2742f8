"""Attention of a decode step: keys and values stay where they are, queries move (pass-Q).

Each sequence's linear layers run on the rank that holds its last block, so the new key and value
are written locally. Then, per layer:

    all-gather q of all sequences -> every rank attends over the tokens it holds -> (out, lse) go
    back to
    the sequence's rank in one exchange -> merge by LSE

Which of the tokens it holds a rank looks at is `LocalKeys`: all of them, or those that CSA shows
each KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.attention.step import Rotation, keep
from sps2_mega.attention.transports.partials import return_partials
from sps2_mega.comm.collectives import all_gather_rows
from sps2_mega.kernels.paged_decode.dispatch import DecodeRows, paged_decode
from sps2_mega.kernels.slot_decode.sdpa import SlotBatch, prepare, slot_decode
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.parallel.groups import Group


class LocalKeys(Protocol):
    def attend(
        self, layer: int, q_BNH: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of the step's queries over this rank's tokens -> (out [B, N, H], lse [B,
        N])."""
        ...


class DenseKeys:
    """All tokens that this rank holds; the sliding window, if any, is already in the rows."""

    def __init__(self, rows: DecodeRows) -> None:
        self._rows = rows

    def attend(
        self, layer: int, q_BNH: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return paged_decode(q_BNH, k_cache, v_cache, self._rows, scale=scale)


class SparseKeys:
    """The tokens that CSA shows. `layer_slots(layer)` lists the slots of each sequence and KV head;
    layers `num_classes` apart see the same, so they are prepared once."""

    def __init__(
        self, layer_slots: Callable[[int], list[list[np.ndarray]]], num_classes: int
    ) -> None:
        self._layer_slots, self._num_classes = layer_slots, num_classes
        self._prepared: dict[int, list[SlotBatch]] = {}

    def attend(
        self, layer: int, q_BNH: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        layer_class = layer % self._num_classes
        if layer_class not in self._prepared:
            self._prepared[layer_class] = prepare(
                self._layer_slots(layer_class), dtype=q_BNH.dtype, device=q_BNH.device
            )
        return slot_decode(q_BNH, k_cache, v_cache, self._prepared[layer_class], scale=scale)


class DecodeAttention:
    """One step's attention of one new token per sequence.

    `counts[r]` sequences have their linear layers on sp rank r; the step's order is rank by rank.
    `keys` are what each of the step's sequences sees on this rank.
    """

    def __init__(
        self,
        pool: KVPool,
        slots_T: Tensor,
        keys: LocalKeys,
        counts: Sequence[int],
        group: Group,
    ) -> None:
        self._pool, self._slots_T, self._keys = pool, slots_T, keys
        self._counts, self._group = counts, group

    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rule: SoftmaxParams,
        rotation: Rotation | None = None,
    ) -> Tensor:
        k_cache, v_cache = self._pool.layer(layer)
        keep((k_cache, v_cache), q_TNH, k_TKH, v_TKH, self._slots_T, rotation)
        q_BNH = all_gather_rows(q_TNH, self._counts, self._group)
        out_BNH, lse_BN = self._keys.attend(layer, q_BNH, k_cache, v_cache, rule.scale)
        return return_partials(out_BNH, lse_BN, self._counts, self._group)
