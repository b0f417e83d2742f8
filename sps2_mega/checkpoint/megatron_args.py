"""Arguments stored with Megatron checkpoints <-> ModelConfig.

Megatron describes an architecture by switches. Switches that the runtime cannot
reproduce are refused with name and value; an absent switch (older Megatron) has the
value that Megatron gave it then. Checkpoints written here carry the whole ModelConfig
beside the switches, which cannot express all of it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from sps2_mega.checkpoint.architecture import model_config_from_mapping, model_config_to_mapping
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError

OWN_CONFIG = "sps2_mega_model"
_REFUSED: dict[str, tuple[Any, ...]] = {
    # switch: values without effect
    "num_experts": (None, 0, 1),
    "multi_latent_attention": (None, False),
    "squared_relu": (None, False),
    "quick_geglu": (None, False),
    "apply_layernorm_1p": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "rotary_percent": (None, 1.0),
    "rotary_interleaved": (None, False),
    "no_rope_freq": (None, 0),
    "window_attn_skip_freq": (None,),
    "softmax_type": (None, "vanilla"),
    "attention_output_gate": (None, False),
    "linear_attention_freq": (None, 0),
    "experimental_attention_variant": (None,),
    "hybrid_override_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "mtp_num_layers": (None, 0),
    "expert_model_parallel_size": (None, 1),
}
# Constants of Megatron's own llama3-style scaling; only the factor is an argument there.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def model_config_from_args(args: Mapping[str, Any], where: str) -> ModelConfig:
    """Convert `args`, the `vars()` of the stored namespace; `where` starts every error message.

    Raises:
        ConfigError: a needed argument is absent, or one has a value that cannot be run.
    """
    if isinstance(args.get(OWN_CONFIG), Mapping):
        return model_config_from_mapping(args[OWN_CONFIG], f"{where}: {OWN_CONFIG}")
    for name, harmless in _REFUSED.items():
        if args.get(name) not in harmless:
            raise ConfigError(f"{where}: {name}={args[name]!r} is not supported")
    heads, hidden = _need(args, "num_attention_heads", where), _need(args, "hidden_size", where)
    rope, window = _rope(args, where), _window(args, where)
    fields: dict[str, Any] = {
        "num_layers": _need(args, "num_layers", where),
        "hidden_size": hidden,
        "ffn_hidden_size": args.get("ffn_hidden_size") or 4 * hidden,
        "num_heads": heads,
        "num_kv_heads": args.get("num_query_groups")
        if args.get("group_query_attention")
        else heads,
        "head_dim": args.get("kv_channels") or hidden // heads,
        "vocab_size": args.get("vocab_size") or _need(args, "padded_vocab_size", where),
        "max_position_embeddings": _need(args, "max_position_embeddings", where),
        "norm": _norm(args, where),
        "norm_eps": _first(args, "norm_epsilon", "layernorm_epsilon", default=1e-5),
        "activation": _activation(args),
        "linear_bias": bool(args.get("add_bias_linear", True)),
        "qkv_bias": bool(args.get("add_qkv_bias", False)),
        "qk_norm": bool(args.get("qk_layernorm", False)),
        "tie_embeddings": not args.get("untie_embeddings_and_output_weights", False),
        "rope": rope,
        "sliding_window": window,
        "dtype": _dtype(args),
    }
    return model_config_from_mapping({"family": _family(fields), **fields}, where)


def model_config_to_args(config: ModelConfig, *, padded_vocab: int) -> Namespace:
    """Arguments that a Megatron training run would store for a model, at TP 1 and PP 1."""
    rope = config.rope
    args: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_heads,
        "group_query_attention": config.num_kv_heads != config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab,
        "make_vocab_size_divisible_by": 128,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "normalization": "RMSNorm" if config.norm == "rmsnorm" else "LayerNorm",
        "norm_epsilon": config.norm_eps,
        "layernorm_epsilon": config.norm_eps,
        "swiglu": config.gated,
        "openai_gelu": config.activation == "gelu_tanh",
        "bias_gelu_fusion": False,
        "add_bias_linear": config.linear_bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm,
        "untie_embeddings_and_output_weights": not config.tie_embeddings,
        "position_embedding_type": "learned_absolute" if rope is None else "rope",
        "window_size": None if config.sliding_window is None else (config.sliding_window - 1, 0),
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        OWN_CONFIG: model_config_to_mapping(config),
    }
    if rope is not None:
        args["rotary_base"] = int(rope.theta) if rope.theta.is_integer() else rope.theta
        args["rotary_percent"] = 1.0
        args["use_rope_scaling"] = rope.scaling == "llama3"
        args["rope_scaling_factor"] = rope.factor
        args["rotary_seq_len_interpolation_factor"] = (
            rope.factor if rope.scaling == "linear" else None
        )
    return Namespace(**args)


def saved_layout(args: Mapping[str, Any]) -> tuple[int, int] | None:
    """(tp, pp) of the run that wrote the checkpoint, or None if not recorded."""
    tp, pp = args.get("tensor_model_parallel_size"), args.get("pipeline_model_parallel_size")
    return (tp, pp) if isinstance(tp, int) and isinstance(pp, int) else None


def _family(fields: Mapping[str, Any]) -> str:
    # The family only decides the spelling of weights for Hugging Face;
    # the numbers follow from the fields.
    if fields["rope"] is None:
        return "gpt2"
    if fields["qk_norm"]:
        return "qwen3"
    if fields["qkv_bias"]:
        return "qwen2"
    return "llama" if fields["sliding_window"] is None else "mistral"


def _rope(args: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    kind = args.get("position_embedding_type", "learned_absolute")
    if kind == "learned_absolute":
        return None
    if kind != "rope":
        raise ConfigError(f"{where}: position_embedding_type={kind!r} is not supported")
    rope: dict[str, Any] = {"theta": float(args.get("rotary_base") or 10000.0)}
    if args.get("use_rope_scaling"):
        return rope | {
            "scaling": "llama3",
            "factor": args.get("rope_scaling_factor") or 8.0,
            **_LLAMA3,
        }
    if factor := args.get("rotary_seq_len_interpolation_factor"):
        return rope | {"scaling": "linear", "factor": factor}
    return rope


def _window(args: Mapping[str, Any], where: str) -> int | None:
    window = args.get("window_size")
    if window is None:
        return None
    if len(window) != 2 or window[1] != 0 or window[0] < 0:
        raise ConfigError(
            f"{where}: window_size={window!r} is not supported (needs (tokens before, 0))"
        )
    return int(window[0]) + 1


def _norm(args: Mapping[str, Any], where: str) -> str:
    norms = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}
    name = args.get("normalization", "LayerNorm")
    if name not in norms:
        raise ConfigError(f"{where}: normalization={name!r} is not supported ({', '.join(norms)})")
    return norms[name]


def _activation(args: Mapping[str, Any]) -> str:
    if args.get("swiglu"):
        return "silu_gated"
    # Megatron's fused bias + GELU kernel, which is its default, computes the tanh approximation.
    fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
    return "gelu_tanh" if args.get("openai_gelu") or fused else "gelu"


def _dtype(args: Mapping[str, Any]) -> str:
    if args.get("bf16"):
        return "bfloat16"
    return "float16" if args.get("fp16") else "float32"


def _need(args: Mapping[str, Any], name: str, where: str) -> int:
    value = args.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{where}: {name} must be an integer, found {value!r}")
    return value


def _first(args: Mapping[str, Any], *names: str, default: float) -> float:
    return float(next((args[name] for name in names if args.get(name) is not None), default))
