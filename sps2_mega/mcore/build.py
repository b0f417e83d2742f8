"""Megatron's GPTModel with our core attention and feed-forward layers, on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sps2_mega.attention.transports.base import SoftmaxParams
from sps2_mega.checkpoint.sharding import padded_vocab_size
from sps2_mega.config import ModelConfig
from sps2_mega.mcore._compat import eager_import, replace_mlp, without_warnings
from sps2_mega.mcore.config import transformer_config
from sps2_mega.mcore.core_attention import SPCoreAttention
from sps2_mega.mcore.feed_forward import feed_forward_class
from sps2_mega.mcore.rope import attention_factor

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def build_gpt_model(
    model: ModelConfig, *, tp: int, sp: int, dtype: torch.dtype, device_type: str = "cpu"
) -> GPTModel:
    """Build this TP rank's GPTModel on the meta device; needs Megatron's parallel state."""
    with eager_import(device_type):
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import ModuleSpec

    with without_warnings():
        config = transformer_config(model, tp=tp, sp=sp, dtype=dtype)
        spec = get_gpt_layer_local_spec(
            qk_layernorm=model.qk_norm,
            qk_l2_norm=model.qk_l2_norm,
            normalization=config.normalization,
        )
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=SPCoreAttention,
        params={
            "softmax": SoftmaxParams(
                scale=attention_factor(model.rope) ** 2 * _softmax_scale(model),
                window=model.sliding_window,
            ),
        },
    )
    replace_mlp(spec, feed_forward_class())
    with torch.device("meta"), without_warnings():
        gpt = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(model.vocab_size, tp),
            max_sequence_length=model.max_position_embeddings,
            share_embeddings_and_output_weights=model.tie_embeddings,
            # "none": `GPT.forward` gives rotary angles to the layers instead.
            position_embedding_type="learned_absolute" if model.rope is None else "none",
            parallel_output=True,
        )
    # Norms are created in float32 whatever params_dtype says. Frozen weights take Megatron's plain
    # linear path, without its preparations (and warnings) for gradients.
    return gpt.to(dtype).requires_grad_(False).eval()


def _softmax_scale(model: ModelConfig) -> float:
    return model.head_dim**-0.5 if model.softmax_scale is None else model.softmax_scale
