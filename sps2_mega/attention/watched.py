"""Attention of a step that tells when a layer is done: its new keys and values are then in the
cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.attention.step import Rotation


class LayerAttention(Protocol):
    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rule: SoftmaxParams,
        rotation: Rotation | None = None,
    ) -> Tensor: ...


class WatchedAttention:
    """The same attention; calls `on_layer(layer)` after each layer, on every rank, also one without
    tokens."""

    def __init__(self, attention: LayerAttention, on_layer: Callable[[int], None]) -> None:
        self._attention, self._on_layer = attention, on_layer

    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rule: SoftmaxParams,
        rotation: Rotation | None = None,
    ) -> Tensor:
        out_TNH = self._attention.attend(layer, q_TNH, k_TKH, v_TKH, rule, rotation)
        self._on_layer(layer)
        return out_TNH
