"""Replacement of one module in Megatron's layers: it hands Q, K and V to the step's attention.

What that does (cache, transport, decode) is decided outside the model. This module knows only its
layer and its softmax. Where Megatron was given no rotary angles, the step's attention gets them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from sps2_mega.attention.step import Rotation
    from sps2_mega.attention.transports.base import SoftmaxParams


class LayerAttention(Protocol):
    """Contract of `attention.step.StepAttention`, also for stand-ins."""

    def run_layer(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        softmax: SoftmaxParams,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Keep this rank's new keys and values, and attend -> [T, N, H].

        With `rotation`, Q and K are not rotated yet, and may be changed.
        """
        ...


class SPCoreAttention(nn.Module):
    """Megatron's `core_attention`: Q [T, 1, N/tp, H], K, V [T, 1, K/tp, H] -> [T, 1, N/tp * H]."""

    def __init__(self, *, layer_number: int, softmax: SoftmaxParams, **_megatron: Any) -> None:
        super().__init__()
        self._layer = layer_number - 1
        self._softmax = softmax

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
        attention: LayerAttention = packed_seq_params.attention
        num_tokens: int = packed_seq_params.num_tokens
        q_TNH, k_TKH, v_TKH = (x.squeeze(1)[:num_tokens] for x in (query, key, value))
        rotation: Rotation | None = packed_seq_params.rotation
        if rotation is not None:
            rotation = rotation.rows(slice(num_tokens))
        out_TNH = attention.run_layer(self._layer, q_TNH, k_TKH, v_TKH, self._softmax, rotation)
        if num_tokens < query.shape[0]:
            # The placeholder of a rank without tokens (see `GPT.begin`): nobody reads its output.
            out_TNH = query.new_zeros(query.squeeze(1).shape)
        return out_TNH.reshape(out_TNH.shape[0], 1, out_TNH.shape[1] * out_TNH.shape[2])
