"""Settings stored with Megatron checkpoints <-> ModelConfig.

Megatron describes an architecture by switches, in two vocabularies that hardly contradict each
other: the arguments of Megatron-LM, and the fields of megatron-core and Megatron-Bridge (`bridge`
finds them). `table` refuses switches that the runtime cannot reproduce, with
name and value; an absent switch (older Megatron) has the value that Megatron gave it then.
Checkpoints written here carry the whole ModelConfig beside the switches, which cannot express all
of it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from sps2_mega.checkpoint.architecture import model_config_from_mapping, model_config_to_mapping
from sps2_mega.checkpoint.megatron.settings.activation import activation_fields, activation_to_args
from sps2_mega.checkpoint.megatron.settings.hybrid import hybrid_pattern, without_pattern
from sps2_mega.checkpoint.megatron.settings.rope import no_rope_layers, rope_fields, rope_to_args
from sps2_mega.checkpoint.megatron.settings.table import check_settings, is_empty, of_bridge
from sps2_mega.checkpoint.megatron.settings.values import number, refuse, size
from sps2_mega.config import ModelConfig

OWN_CONFIG = "sps2_mega_model"
_NORMS = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}


def model_config_from_args(args: Mapping[str, Any], where: str) -> ModelConfig:
    """Convert `args`, the `vars()` of the stored namespace; `where` starts every error message.

    Raises:
        ConfigError: a needed argument is absent, or one is unknown or has a value that cannot be
            run.
    """
    if isinstance(args.get(OWN_CONFIG), Mapping):
        return model_config_from_mapping(args[OWN_CONFIG], f"{where}: {OWN_CONFIG}")
    if (pattern := hybrid_pattern(args, where)) is not None:
        args = without_pattern(args, pattern)
    check_settings(args, where)
    heads, hidden = size(args, "num_attention_heads", where), size(args, "hidden_size", where)
    layers = size(args, "num_layers", where)
    head_dim = size(args, "kv_channels", where, hidden // heads)
    rope = rope_fields(args, head_dim, where)
    l2_norm = _l2_norm(args, where)
    eps = number(args, ("norm_epsilon", "layernorm_epsilon"), where, above=0)
    bias = bool(args.get("add_bias_linear", True))
    fields: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": size(args, "ffn_hidden_size", where, 4 * hidden),
        "num_heads": heads,
        "num_kv_heads": _query_groups(args, heads, where),
        "head_dim": head_dim,
        "vocab_size": args.get("vocab_size") or size(args, "padded_vocab_size", where),
        "max_position_embeddings": _max_positions(args, where),
        "norm": _norm(args, where),
        "norm_eps": 1e-5 if eps is None else eps,
        "linear_bias": bias,
        # Biases of all linear layers are the projection's too, whatever this switch says.
        "qkv_bias": bool(args.get("add_qkv_bias", False)) and not bias,
        # Megatron takes the norm without weights where both are set.
        "qk_norm": bool(args.get("qk_layernorm", False)) and not l2_norm,
        "qk_l2_norm": l2_norm,
        "tie_embeddings": _tied(args),
        "rope": rope,
        "no_rope_layers": no_rope_layers(args, layers, rope, where),
        "softmax_scale": number(args, ("softmax_scale",), where, above=0),
        "sliding_window": _window(args, layers, where),
        "dtype": _dtype(args),
        **activation_fields(args, where),
    }
    return model_config_from_mapping({"family": _family(fields), **fields}, where)


def model_config_to_args(config: ModelConfig, *, padded_vocab: int) -> Namespace:
    """Arguments that a Megatron training run would store for a model, at TP 1 and PP 1."""
    rope = config.rope
    no_rope = [int(layer in config.no_rope_layers) for layer in range(config.num_layers)]
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
        "add_bias_linear": config.linear_bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm,
        "qk_l2_norm": config.qk_l2_norm,
        "untie_embeddings_and_output_weights": not config.tie_embeddings,
        "position_embedding_type": "learned_absolute" if rope is None else "rope",
        "no_rope_freq": no_rope if config.no_rope_layers else None,
        "softmax_scale": config.softmax_scale,
        "activation_func_clamp_value": config.activation_clamp,
        "glu_linear_offset": config.glu_linear_offset,
        "window_size": None if config.sliding_window is None else (config.sliding_window - 1, 0),
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        **activation_to_args(config.activation, bias=config.linear_bias),
        OWN_CONFIG: model_config_to_mapping(config),
    }
    if rope is not None:
        args |= rope_to_args(rope, config.head_dim)
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


def _query_groups(args: Mapping[str, Any], heads: int, where: str) -> int:
    if of_bridge(args):
        groups = size(args, "num_query_groups", where, heads)
    elif args.get("group_query_attention"):
        groups = size(args, "num_query_groups", where)
    else:
        return heads
    if heads % groups:
        why = f"num_attention_heads={heads} must be a multiple of it"
        raise refuse(where, "num_query_groups", groups, why)
    return groups


def _max_positions(args: Mapping[str, Any], where: str) -> int:
    named = of_bridge(args) and not args.get("max_position_embeddings")
    return size(args, "seq_length" if named else "max_position_embeddings", where)


def _tied(args: Mapping[str, Any]) -> bool:
    if of_bridge(args):
        return bool(args.get("share_embeddings_and_output_weights", True))
    return not args.get("untie_embeddings_and_output_weights", False)


def _l2_norm(args: Mapping[str, Any], where: str) -> bool:
    if not args.get("qk_l2_norm"):
        return False
    if args.get("transformer_impl", "transformer_engine") != "transformer_engine":
        why = f"Megatron-LM ignores it with transformer_impl={args['transformer_impl']!r}"
        raise refuse(where, "qk_l2_norm", True, why)
    return True


def _window(args: Mapping[str, Any], num_layers: int, where: str) -> int | None:
    window: Any = args.get("window_size")
    if is_empty(window):
        return None
    pair = isinstance(window, (list, tuple)) and len(window) == 2
    if not pair or not all(isinstance(x, int) for x in window) or window[1] or window[0] < 0:
        raise refuse(where, "window_size", window, "needs (tokens before, 0)")
    kinds = set(_windowed_layers(args.get("window_attn_skip_freq"), num_layers, where))
    if len(kinds) > 1:
        why = "needs a window in all layers, or in none"
        raise refuse(where, "window_attn_skip_freq", args["window_attn_skip_freq"], why)
    return int(window[0]) + 1 if kinds == {True} else None


def _windowed_layers(skip: Any, num_layers: int, where: str) -> list[bool]:
    """Whether each layer has a window, by megatron-core's rule."""
    if skip is None:
        return [True] * num_layers
    if isinstance(skip, int) and skip > 0:
        return [number % skip != 0 for number in range(1, num_layers + 1)]
    if isinstance(skip, (list, tuple)) and len(skip) >= num_layers:
        return [bool(flag) for flag in skip[:num_layers]]
    raise refuse(where, "window_attn_skip_freq", skip, f"needs one number per layer, {num_layers}")


def _norm(args: Mapping[str, Any], where: str) -> str:
    name = args.get("normalization", "LayerNorm")
    if name not in _NORMS:
        raise refuse(where, "normalization", name, f"known are {', '.join(_NORMS)}")
    return _NORMS[name]


def _dtype(args: Mapping[str, Any]) -> str:
    if args.get("bf16"):
        return "bfloat16"
    if args.get("fp16"):
        return "float16"
    return "bfloat16" if "bfloat16" in str(args.get("params_dtype")) else "float32"
