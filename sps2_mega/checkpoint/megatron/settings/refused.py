"""Settings with which the model computes something that is not run here.

Each has values without effect, which are accepted, and a reason for refusing any other one.
"""

from __future__ import annotations

from typing import Any

Refusal = tuple[tuple[Any, ...], str]
"""(values without effect, why others are refused)"""

_OFF = (None, False)
_NONE = (None,)
_EXPERTS = "mixtures of experts are not run"
_NORM = "norms that scale by 1 + weight are not run"
_QUANTIZED = "quantized models are not run"

REFUSED: dict[str, Refusal] = {
    "num_experts": ((None, 0), _EXPERTS),
    "num_moe_experts": ((None, 0), _EXPERTS),
    "multi_latent_attention": (_OFF, "latent attention is not run"),
    "experimental_attention_variant": (_NONE, "other kinds of attention are not run"),
    "linear_attention_freq": ((None, 0), "linear attention is not run"),
    "attention_output_gate": (_OFF, "a gate on the attention's output is not run"),
    "attention_chunk_size": ((None, 0), "attention in chunks is not run"),
    "softmax_type": ((None, "vanilla"), "attention sinks are not run"),
    "heterogeneous_layers_config_path": (_NONE, "layers of different shapes are not run"),
    "heterogeneous_layers_config_encoded_json": ((None, ""), "layers of different shapes"),
    "heterogeneous_block_specs": (_OFF, "layers of different shapes are not run"),
    "mtp_num_layers": ((None, 0), "layers that predict several tokens are not run"),
    "mtp_enabled": (_OFF, "layers that predict several tokens are not run"),
    "export_num_medusa_heads": ((None, 0), "more than one output head is not run"),
    "export_num_eagle_layers": ((None, 0), "more than one output head is not run"),
    "retro_add_retriever": (_OFF, "retrieval is not run"),
    "apply_layernorm_1p": (_OFF, _NORM),
    "layernorm_zero_centered_gamma": (_OFF, _NORM),
    "apply_residual_connection_post_layernorm": (_OFF, "the residual is taken before the norm"),
    "onnx_safe": (_OFF, "its GELU depends on the release"),
    "use_te_activation_func": (_OFF, "Transformer Engine's activations differ from torch's"),
    "use_mup": (_OFF, "its multipliers of embedding and logits are not applied"),
    "add_position_embedding": ((None, True), "a model without positions is not run"),
    "rope_type": ((None, "rope"), "Megatron takes it for latent attention only"),
    "mrope_section": (_NONE, "positions of images are not run"),
    "rotary_seq_len_interpolation_factor": (
        (None, 1),
        "releases of Megatron-LM before 0.19 ignore it, later ones do not",
    ),
    "enable_gpt_oss": (_OFF, "it sets rotary scaling that the arguments do not state"),
    "export_qk_l2_norm": (_OFF, "models that ModelOpt builds are not run"),
    "export_offline_model": (_OFF, "models that ModelOpt builds are not run"),
    "export_quant_cfg": ((None, "None", "none"), _QUANTIZED),
    "export_real_quant_cfg": ((None, "None", "none"), _QUANTIZED),
    "export_kv_cache_quant": ((None, False, "none"), _QUANTIZED),
    "modelopt_enabled": (_OFF, _QUANTIZED),
    "restore_modelopt_state": (_OFF, _QUANTIZED),
    "quant_recipe": (_NONE, _QUANTIZED),
    "use_kitchen": (_OFF, _QUANTIZED),
    "kitchen_config_file": (_NONE, _QUANTIZED),
    "kitchen_recipe_number": (_NONE, _QUANTIZED),
    "use_grouped_gemm_for_dense_mlp": (_OFF, "its MLP weights have another layout"),
    "dense_grouped_gemm": (_OFF, "its MLP weights have another layout"),
    "use_legacy_models": (_OFF, "models from before megatron-core are not run"),
    "spec": ((None, ["local"]), "layers of a specification of one's own are not known"),
    "transformer_layer_spec": (_NONE, "layers of a specification of one's own are not known"),
    "_target_": (_NONE, "what this class builds is not known"),
    "yaml_cfg": (_NONE, "the model is described in a file beside the arguments"),
}
