"""The one module that is swapped in Megatron's layers: it hands q, k, v to the step's attention.

What the step's attention does (transport, cache, decode) is decided outside the model; this module
only knows its layer and its score rule. Where Megatron was given no rotary angles, the step's
attention gets them.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.attention.step import Rotation


class StepAttention(Protocol):
    def attend(
        self,
        layer: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        rule: SoftmaxParams,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens [T, N, H]; also keeps the new keys and values. With
        `rotation` q and k are not rotated yet, and may be changed."""
        ...


class SPCoreAttention(nn.Module):
    """Megatron's `core_attention`: q [T, 1, N/tp, H], k and v [T, 1, K/tp, H] -> [T, 1, N/tp *
    H]."""

    def __init__(self, *, layer_number: int, rule: SoftmaxParams, **_megatron: Any) -> None:
        super().__init__()
        self._layer = layer_number - 1
        self._rule = rule

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
        num_tokens: int = packed_seq_params.num_tokens
        q_TNH, k_TKH, v_TKH = (x.squeeze(1)[:num_tokens] for x in (query, key, value))
        rotation: Rotation | None = packed_seq_params.rotation
        if rotation is not None:
            rotation = rotation.rows(slice(num_tokens))
        out_TNH = attention.attend(self._layer, q_TNH, k_TKH, v_TKH, self._rule, rotation)
        if num_tokens < query.shape[0]:
            # The placeholder of a rank without tokens (see `GPT.forward`): nobody reads its output.
            out_TNH = query.new_zeros(query.squeeze(1).shape)
        return out_TNH.reshape(out_TNH.shape[0], 1, out_TNH.shape[1] * out_TNH.shape[2])
