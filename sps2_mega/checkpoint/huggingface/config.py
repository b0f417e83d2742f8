"""Hugging Face config.json <-> ModelConfig, for the families that the runtime computes exactly.

Any setting that would change the numbers and cannot be expressed is refused with its name and
value; fields that only concern training or caching are ignored. Both spellings of rotary embeddings
are read: `rope_theta` with `rope_scaling`, and `rope_parameters`. `rope` has the rotary details,
`window` the kinds of attention.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sps2_mega.checkpoint.huggingface.rope import rope_from_hf, rope_to_hf
from sps2_mega.checkpoint.huggingface.window import window_from_hf
from sps2_mega.checkpoint.json_file import read_json, shown
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError

__all__ = [
    "ARCHITECTURES",
    "model_config_from_hf",
    "model_config_to_hf",
    "read_hf_config",
]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    # Defaults of each family's transformers class for fields absent
    # from config.json (None: see the code).
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
}
# Fields whose null is no absent field to a family's class: it refuses the folder.
_NOT_NULL: dict[str, tuple[str, ...]] = {
    "llama": (),
    "mistral": ("num_key_value_heads",),
    "qwen2": ("head_dim",),
    "qwen3": ("head_dim",),
}
_RMS_EPS = 1e-6
_QWEN3_HEAD_DIM = 128
_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_DTYPES = ("float32", "bfloat16", "float16")


def read_hf_config(folder: Path) -> ModelConfig:
    """Read a Hugging Face folder's ModelConfig; generation_config.json overrides the end tokens.

    Raises:
        ConfigError: config.json is absent, unreadable, or describes a model that cannot be run.
    """
    hf = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):
        from sps2_mega.checkpoint.huggingface.fields import check_generation

        stated = read_json(generation)
        check_generation(stated, str(generation))
        ends = stated.get("eos_token_id")
        hf = hf if ends is None else {**hf, "eos_token_id": ends}
    try:
        return model_config_from_hf(hf)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None


def model_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Convert the content of a config.json.

    Raises:
        ConfigError: a field is absent, or has a value that cannot be run; the message names both.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ConfigError(
            f"model_type={shown(family)} is not supported (known: {', '.join(ARCHITECTURES)})"
        )
    # pydantic takes a while to import, and the simulator does without.
    from sps2_mega.checkpoint.huggingface.fields import check_config

    check_config(family, hf)
    return _gpt2(hf) if family == "gpt2" else _rotary_family(family, hf)


def model_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of the config.json that transformers reads as this model.

    The inverse of `model_config_from_hf`.
    """
    eos = config.eos_token_ids
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    }
    return hf | (_gpt2_fields(config) if config.family == "gpt2" else _rotary_fields(config))


def _rotary_family(family: str, hf: Mapping[str, Any]) -> ModelConfig:
    _refuse(hf, "hidden_act", allowed=("silu",), default="silu")
    _refuse(hf, "mlp_bias", allowed=(False,), default=False)
    if family != "qwen2":  # Qwen2 has its QKV bias in the architecture and does not read this field
        _refuse(hf, "attention_bias", allowed=(False,), default=False)
    for name in _NOT_NULL[family]:
        if hf.get(name, 1) is None:
            raise ConfigError(f"{name}=None: {family} needs a number, or no such field")
    defaults = _DEFAULTS[family]
    heads, hidden = _need(hf, "num_attention_heads"), _need(hf, "hidden_size")
    num_layers = _need(hf, "num_hidden_layers")
    max_positions = hf.get("max_position_embeddings", defaults["max_position_embeddings"])
    kv_heads = hf.get("num_key_value_heads", defaults["num_key_value_heads"]) or heads
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    if hf.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise ConfigError(
            f"hidden_size={hidden} is not a multiple of num_attention_heads={heads} (needs "
            "head_dim)"
        )
    if (hf.get("head_dim") or 0) % 2:
        raise ConfigError(f"head_dim={hf['head_dim']} must be even for rotary embeddings")
    return ModelConfig(
        family=family,  # type: ignore[arg-type]
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=_need(hf, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hf.get("head_dim") or (_QWEN3_HEAD_DIM if family == "qwen3" else hidden // heads),
        vocab_size=_need(hf, "vocab_size"),
        max_position_embeddings=max_positions,
        norm_eps=float(hf.get("rms_norm_eps", _RMS_EPS)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        rope=rope_from_hf(hf, max_positions),
        sliding_window=window_from_hf(family, hf, num_layers),
        **_shared_fields(hf),
    )


def _gpt2(hf: Mapping[str, Any]) -> ModelConfig:
    _refuse(hf, "activation_function", allowed=tuple(_GELU), default="gelu_new")
    _refuse(hf, "scale_attn_weights", allowed=(True,), default=True)
    _refuse(hf, "scale_attn_by_inverse_layer_idx", allowed=(False,), default=False)
    _refuse(hf, "add_cross_attention", allowed=(False,), default=False)
    hidden, heads = _need(hf, "n_embd"), _need(hf, "n_head")
    if hidden % heads:
        raise ConfigError(f"n_embd={hidden} is not a multiple of n_head={heads}")
    return ModelConfig(
        family="gpt2",
        num_layers=_need(hf, "n_layer"),
        hidden_size=hidden,
        ffn_hidden_size=hf.get("n_inner") or 4 * hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=_need(hf, "vocab_size"),
        max_position_embeddings=_need(hf, "n_positions"),
        norm="layernorm",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=_GELU[hf.get("activation_function", "gelu_new")],  # type: ignore[arg-type]
        linear_bias=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
        rope=None,
        **_shared_fields(hf),
    )


def _shared_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    eos = hf.get("eos_token_id")
    name = "dtype" if hf.get("dtype") else "torch_dtype"
    dtype = str(hf.get(name) or "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ConfigError(f"{name}={dtype!r} is not supported (known: {', '.join(_DTYPES)})")
    return {
        "dtype": dtype,
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    }


def _rotary_fields(config: ModelConfig) -> dict[str, Any]:
    if config.rope is None:
        raise ConfigError(
            f"family {config.family} needs rotary positions, this model has learned ones"
        )
    hf: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        **rope_to_hf(config.rope),
    }
    if config.family != "qwen2":
        hf["attention_bias"] = False
    if config.family == "llama":
        hf["mlp_bias"] = False
    if config.family != "llama":
        hf["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        windowed = config.sliding_window is not None
        hf["use_sliding_window"] = windowed
        hf["max_window_layers"] = 0 if windowed else config.num_layers
    return hf


def _gpt2_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "n_embd": config.hidden_size,
        "n_inner": config.ffn_hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_position_embeddings,
    }


def _need(hf: Mapping[str, Any], name: str) -> int:
    value = hf.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, found {value!r}")
    return value


def _refuse(hf: Mapping[str, Any], name: str, *, allowed: tuple[Any, ...], default: Any) -> None:
    value = hf.get(name, default)
    if value not in allowed:
        wanted = " or ".join(repr(x) for x in allowed)
        raise ConfigError(f"{name}={value!r} is not supported (needs {wanted})")
