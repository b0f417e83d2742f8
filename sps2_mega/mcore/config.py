"""Megatron's TransformerConfig of a model: inference only, no fusions by CUDA extensions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sps2_mega.config import ModelConfig

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "squared_relu": _squared_relu,
}


def transformer_config(
    model: ModelConfig, *, tp: int, sp: int, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's description of `model` for this parallel layout.

    With fewer KV heads than TP ranks, each KV head is replicated (`checkpoint.sharding` does the
    same to the weights), which is the same mathematics without a gather in every layer.
    """
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=max(model.num_kv_heads, tp),
        kv_channels=model.head_dim,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=model.gated,
        activation_func=_ACTIVATIONS[model.activation.removesuffix("_gated")],
        activation_func_clamp_value=model.activation_clamp,
        glu_linear_offset=model.glu_linear_offset,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        qk_l2_norm=model.qk_l2_norm,
        rotary_interleaved=model.rope is not None and model.rope.interleaved,
        no_rope_freq=(
            [int(layer in model.no_rope_layers) for layer in range(model.num_layers)]
            if model.no_rope_layers
            else None
        ),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        context_parallel_size=sp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
