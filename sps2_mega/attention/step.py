"""One step's attention on one rank: write new keys and values once, then attend.

    core_attention --run_layer(layer, q, k, v)--> StepAttention
        1. rotate new Q and K, write K and V to the cache       one launch on CUDA
        2. attend                                               prefill, decode, hybrid, chunked
        3. on_layer(layer)                                      the layer's keys are in the cache

Megatron's layers rotate Q and K themselves, or leave it to step 1, which then does it in the same
pass over K that writes the cache (`mcore.gpt` decides).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from sps2_mega.kernels.paged_kv.dispatch import append
from sps2_mega.kernels.rotary_append.dispatch import rotate_and_append

if TYPE_CHECKING:
    from sps2_mega.attention.transports.base import SoftmaxParams
    from sps2_mega.kv_cache.pool import KVPool


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary angles [T, R] of a step's tokens, in the type of the heads.

    Pair r of a head is its elements r and R + r.
    """

    cos_TR: Tensor
    sin_TR: Tensor

    def rows(self, part: slice) -> Rotation:
        """Return the angles of some of the tokens."""
        return Rotation(self.cos_TR[part], self.sin_TR[part])


class AttentionKind(Protocol):
    """Attention of one kind of step: prefill, decode, both, or a chunk of a prompt."""

    def attend(
        self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, softmax: SoftmaxParams
    ) -> Tensor:
        """Attend with this rank's new tokens -> [T, N, H].

        Q and K are rotated, and the cache already holds K and V. Ranks without tokens call it too.
        """
        ...


class StepAttention:
    """Attention of one step, called for each layer in order.

    `slots_T` are the cache slots of this rank's new tokens. `on_layer(layer)`, where set, is called
    after each layer on every rank, also on one without tokens; the cache then holds the layer's new
    keys and values.
    """

    def __init__(self, pool: KVPool, slots_T: Tensor, kind: AttentionKind) -> None:
        self.pool, self.slots_T, self.kind = pool, slots_T, kind
        self.on_layer: Callable[[int], None] | None = None
        self._row_slots_T, self._ends_layer = slots_T, True

    def select_rows(self, rows: slice, *, ends_layer: bool) -> None:
        """Restrict the next layer call to some of the rank's tokens.

        `ends_layer` says that no other rows of the layer follow, so `on_layer` is called after it.
        """
        self._row_slots_T, self._ends_layer = self.slots_T[rows], ends_layer

    def run_layer(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        softmax: SoftmaxParams,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Write K and V to the cache and attend -> [T, N, H]; `rotation` changes Q and K in place.

        Args:
            layer: Number of the layer, from 0.
            q_TNH: Queries of this rank's tokens, N heads of this TP rank.
            k_TKH: Keys of the same tokens, K heads of this TP rank.
            v_TKH: Values of the same tokens.
            softmax: Scale and sliding window of the layer.
            rotation: Rotary angles of the tokens; None where Megatron has rotated Q and K.
        """
        cache = self.pool.layer(layer)
        if rotation is None:
            append(*cache, k_TKH, v_TKH, self._row_slots_T)
        else:
            rotate_and_append(
                q_TNH,
                k_TKH,
                v_TKH,
                *cache,
                self._row_slots_T,
                cos_TR=rotation.cos_TR,
                sin_TR=rotation.sin_TR,
            )
        out_TNH = self.kind.attend(layer, q_TNH, k_TKH, v_TKH, softmax)
        if self.on_layer is not None and self._ends_layer:
            self.on_layer(layer)
        return out_TNH
