"""The one module that is swapped in Megatron's layers: it hands q, k, v to the step's attention.

What the step's attention does (transport, cache, decode) is decided outside the model; this module only
knows its layer, the softmax scale and the sliding window.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class StepAttention(Protocol):
    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention of this rank's tokens [T, N, H]; also keeps the new keys and values."""
        ...


class SPCoreAttention(nn.Module):
    """Megatron's `core_attention`: q [T, 1, N/tp, H], k and v [T, 1, K/tp, H] -> [T, 1, N/tp * H]."""

    def __init__(self, *, layer_number: int, scale: float, window: int | None, **_megatron: Any) -> None:
        super().__init__()
        self._layer = layer_number - 1
        self._scale, self._window = scale, window

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: Any,
        **_megatron: Any,
    ) -> Tensor:
        attention: StepAttention = packed_seq_params.attention
        out_TNH = attention.attend(
            self._layer,
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            scale=self._scale,
            window=self._window,
        )
        return out_TNH.reshape(out_TNH.shape[0], 1, out_TNH.shape[1] * out_TNH.shape[2])
