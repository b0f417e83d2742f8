"""Attention of a decode step: keys and values stay where they are, queries move (pass-Q).

The rank that holds a sequence's last block runs its linear layers, so the new key and value are
written locally. Per layer:

    all-gather Q of all sequences
    each rank attends over the tokens it holds -> (out, lse)
    (out, lse) go back to the rank of the sequence in one exchange, and merge by LSE

`LocalKeys` decides which of its tokens a rank looks at: all, or those CSA shows each KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from sps2_mega.attention.transports.partials import return_partials
from sps2_mega.comm.collectives import all_gather_rows
from sps2_mega.kernels.paged_decode.dispatch import DecodeRows, paged_decode
from sps2_mega.kernels.slot_decode.sdpa import SlotBatch, prepare, slot_decode

if TYPE_CHECKING:
    import numpy as np

    from sps2_mega.attention.transports.base import SoftmaxParams
    from sps2_mega.kv_cache.pool import KVPool
    from sps2_mega.parallel.groups import Group


class LocalKeys(Protocol):
    """Tokens of this rank that each sequence of a decode step sees."""

    def partial(
        self, layer: int, q_BNH: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend over this rank's tokens -> (out [B, N, H], lse [B, N] float32)."""
        ...


class DenseKeys:
    """All tokens that this rank holds; the rows already leave out what a sliding window hides."""

    def __init__(self, rows: DecodeRows) -> None:
        self._rows = rows

    def partial(
        self, layer: int, q_BNH: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return paged_decode(q_BNH, k_cache, v_cache, self._rows, scale=scale)


class SparseKeys:
    """Tokens that CSA shows.

    `layer_slots(layer)` lists the slots of each sequence and KV head. Layers `num_classes` apart
    see the same tokens, so their slots are prepared once.
    """

    def __init__(
        self, layer_slots: Callable[[int], list[list[np.ndarray]]], num_classes: int
    ) -> None:
        self._layer_slots, self._num_classes = layer_slots, num_classes
        self._prepared: dict[int, list[SlotBatch]] = {}

    def partial(
        self, layer: int, q_BNH: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        layer_class = layer % self._num_classes
        if layer_class not in self._prepared:
            self._prepared[layer_class] = prepare(
                self._layer_slots(layer_class), dtype=q_BNH.dtype, device=q_BNH.device
            )
        return slot_decode(q_BNH, k_cache, v_cache, self._prepared[layer_class], scale=scale)


class DecodeAttention:
    """Attention of one new token per sequence.

    `counts[r]` sequences have their linear layers on SP rank r; the step orders sequences rank by
    rank. `keys` holds what each of them sees on this rank.
    """

    def __init__(self, pool: KVPool, keys: LocalKeys, counts: Sequence[int], group: Group) -> None:
        self._pool, self._keys, self._counts, self._group = pool, keys, counts, group

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        q_BNH = all_gather_rows(q_TNH, self._counts, self._group)
        partial = self._keys.partial(layer, q_BNH, *self._pool.layer(layer), softmax.scale)
        return return_partials(*partial, self._counts, self._group)
