"""Settings of training runs drawn at random: a base, and one to four of its settings changed."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sps2_mega.checkpoint.megatron.settings.table import SETTINGS

_COMMON: dict[str, Any] = dict(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    kv_channels=16,
    rotary_percent=1.0,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
_ARGUMENTS: dict[str, Any] = _COMMON | dict(
    padded_vocab_size=128,
    make_vocab_size_divisible_by=128,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    bias_gelu_fusion=True,
    bias_swiglu_fusion=True,
    rotary_base=10000,
)
_SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}
_GELU = {"_target_": "torch._C._nn.gelu", "_call_": False}
_PROVIDER: dict[str, Any] = _COMMON | dict(
    _target_="megatron.bridge.models.gpt_provider.GPTModelProvider",
    vocab_size=128,
    should_pad_vocab=True,
    make_vocab_size_divisible_by=128,
    seq_length=64,
    layernorm_epsilon=1e-5,
    rotary_base=500000,
)
BASES: dict[str, dict[str, Any]] = {
    "arguments llama": _ARGUMENTS
    | dict(
        normalization="RMSNorm", swiglu=True, add_bias_linear=False, add_qkv_bias=False,
        group_query_attention=True, num_query_groups=2, position_embedding_type="rope",
        untie_embeddings_and_output_weights=True,
    ),
    "arguments gpt": _ARGUMENTS
    | dict(
        normalization="LayerNorm", swiglu=False, add_bias_linear=True, add_qkv_bias=True,
        group_query_attention=False, num_query_groups=1,
        position_embedding_type="learned_absolute", untie_embeddings_and_output_weights=False,
    ),
    "bridge llama": _PROVIDER
    | dict(
        normalization="RMSNorm", activation_func=_SILU, gated_linear_unit=True,
        add_bias_linear=False, num_query_groups=2, position_embedding_type="rope",
        share_embeddings_and_output_weights=False, bias_activation_fusion=True,
    ),
    "bridge gelu": _PROVIDER
    | dict(
        normalization="LayerNorm", activation_func=_GELU, gated_linear_unit=False,
        add_bias_linear=True, num_query_groups=None, position_embedding_type="rope",
        share_embeddings_and_output_weights=True, bias_activation_fusion=False,
    ),
}  # fmt: skip

# Values of settings that decide what is computed, in both vocabularies.
_SHARED: dict[str, list[Any]] = {
    "num_layers": [1, 3],
    "hidden_size": [32, 64],
    "ffn_hidden_size": [48, None],
    "num_attention_heads": [2, 6],
    "num_query_groups": [1, 3, 4],
    "kv_channels": [8, 12, None],
    "normalization": ["RMSNorm", "LayerNorm"],
    "add_bias_linear": [True, False],
    "add_qkv_bias": [True, False],
    "qk_layernorm": [True],
    "qk_l2_norm": [True],
    "position_embedding_type": ["rope", "yarn", "learned_absolute", "none", "mrope"],
    "rotary_base": [100, 10000, 1000000],
    "rotary_percent": [0.25, 0.5, 0.75, 0.3],
    "rotary_interleaved": [True],
    "no_rope_freq": [1, 2, 3, [0, 1], [1, 0]],
    "softmax_scale": [0.0, 0.05, 1.0],
    "window_size": [[4, 0], [0, 0], (15, 0), (-1, 0), (3, 3)],
    "window_attn_skip_freq": [1, 2, 5, [1, 1], [0, 1]],
    "glu_linear_offset": [0.5, 1.0],
    "activation_func_clamp_value": [0.7, 7.0],
    "rope_scaling_factor": [8.0, 32.0],
    "use_te_activation_func": [True],
    "bf16": [True],
    "fp16": [True],
    "tensor_model_parallel_size": [2, 4],
    "pipeline_model_parallel_size": [2],
}
_OF_ARGUMENTS: dict[str, list[Any]] = _SHARED | {
    "group_query_attention": [True, False],
    "norm_epsilon": [1e-6, 1e-2],
    "max_position_embeddings": [48, 128],
    "padded_vocab_size": [256],
    "untie_embeddings_and_output_weights": [True, False],
    "swiglu": [True, False],
    "squared_relu": [True],
    "quick_geglu": [True],
    "openai_gelu": [True],
    "bias_gelu_fusion": [True, False],
    "bias_swiglu_fusion": [True, False],
    "use_rotary_position_embeddings": [True],
    "use_rope_scaling": [True],
    "rotary_seq_len_interpolation_factor": [1, 2, 4],
    "rotary_scaling_factor": [2.0, 4.0],
    "mscale": [0.7, 2.0],
    "mscale_all_dim": [0.5, 1.0],
    "yarn_original_max_position_embeddings": [16, 32],
    "yarn_beta_fast": [16.0, 4.0],
    "yarn_beta_slow": [2.0, 0.5],
    "yarn_correction_range_round_to_int": [True, False],
    "transformer_impl": ["transformer_engine", "local"],
}
_ACTIVATIONS: list[Any] = [
    _SILU,
    _GELU,
    "torch.nn.functional.relu",
    {"_target_": "torch._C._nn.gelu", "_partial_": True, "_args_": [], "approximate": "tanh"},
    {"_target_": "torch._C._nn.gelu", "_partial_": True, "_args_": [], "approximate": "none"},
    {"_target_": "megatron.core.activations.squared_relu", "_call_": False},
    {"_target_": "megatron.core.activations.fast_gelu", "_call_": False},
    {"_target_": "megatron.core.fusions.fused_bias_geglu.quick_gelu", "_call_": False},
    {"_target_": "megatron.core.activations.quick_gelu", "_call_": False},
    {"_target_": "torch.nn.functional.sigmoid", "_call_": False},
]
_OF_BRIDGE: dict[str, list[Any]] = _SHARED | {
    "activation_func": _ACTIVATIONS,
    "gated_linear_unit": [True, False],
    "bias_activation_fusion": [True, False],
    "layernorm_epsilon": [1e-6, 1e-2],
    "seq_length": [48, 128],
    "vocab_size": [100, 200],
    "share_embeddings_and_output_weights": [True, False],
    "rope_scaling": [True],
    "seq_len_interpolation_factor": [1.0, 2.0, 4.0],
    "rotary_scaling_factor": [4.0],
    "yarn_mscale": [0.7, None],
    "yarn_mscale_all_dim": [0.5, None],
    "_target_": ["megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"],
    "transformer_layer_spec": [
        {"_target_": "megatron.bridge.models.gpt_provider.local_layer_spec", "_call_": False},
        {"_target_": "somewhere.else.layer_spec", "_call_": False},
    ],
}
# Settings that only mean something together: drawn as one change.
_TOGETHER: dict[str, list[dict[str, Any]]] = {
    "arguments": [
        dict(position_embedding_type="yarn", rotary_scaling_factor=factor, mscale=mscale,
             yarn_original_max_position_embeddings=16, yarn_beta_fast=4.0)
        for factor in (2.0, 8.0) for mscale in (1.0, 0.7)
    ]
    + [dict(swiglu=False, squared_relu=True, bias_gelu_fusion=False)]
    + [dict(swiglu=False, quick_geglu=True, bias_gelu_fusion=False, glu_linear_offset=1.0)]
    + [dict(bias_swiglu_fusion=False, activation_func_clamp_value=0.5)]
    + [dict(position_embedding_type="yarn", rotary_scaling_factor=4.0, mscale_all_dim=0.5,
            yarn_original_max_position_embeddings=16, yarn_beta_slow=0.3,
            yarn_correction_range_round_to_int=False)]
    + [dict(use_rope_scaling=True, position_embedding_type="rope", rope_scaling_factor=8.0)]
    + [dict(window_size=(4, 0), window_attn_skip_freq=skip) for skip in (1, 2, 5, [1, 1], [0, 1])],
    "bridge": [
        dict(position_embedding_type="yarn", yarn_rotary_scaling_factor=factor, yarn_mscale=1.0,
             yarn_mscale_all_dim=all_dim, yarn_original_max_position_embeddings=16,
             yarn_beta_fast=4.0, yarn_beta_slow=1.0, yarn_correction_range_round_to_int=rounds)
        for factor in (1.0, 4.0) for all_dim in (0.0, 1.0) for rounds in (True, None)
    ]
    + [dict(position_embedding_type="yarn", yarn_rotary_scaling_factor=4.0)]
    + [dict(rope_scaling=True, rope_scaling_factor=factor) for factor in (8.0, 32.0)]
    + [dict(_target_="megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B",
            scale_factor=factor, low_freq_factor=1.0, high_freq_factor=high, old_context_len=64)
       for factor in (8.0, 32.0) for high in (2.0, 4.0)]
    + [dict(activation_func=activation, bias_activation_fusion=False) for activation in
       _ACTIVATIONS]
    + [dict(bias_activation_fusion=False, activation_func_clamp_value=0.5, glu_linear_offset=1.0)]
    + [dict(position_embedding_type="learned_absolute", seq_length=length) for length in (48, 128)]
    + [dict(window_size=[4, 0], window_attn_skip_freq=skip) for skip in (1, 2, 5, [1, 1], [0, 1])],
}  # fmt: skip
# Every name in the table that is not above; a value is guessed from the values without effect.
_REFUSED = sorted(name for name, setting in SETTINGS.items() if setting.kind == "refused")
_HARMLESS = sorted(name for name, setting in SETTINGS.items() if setting.kind == "harmless")
_KINDS = ("run", "together", "harmless", "refused", "foreign", "unknown")
_WEIGHTS = (6, 2, 3, 1, 0.2, 0.2)
_ANYTHING: list[Any] = [True, False, 1, 2, 0.5, "text", [1]]


@dataclass(frozen=True, slots=True)
class Drawn:
    base: str
    changes: dict[str, Any]

    @property
    def bridge(self) -> bool:
        return self.base.startswith("bridge")

    @property
    def settings(self) -> dict[str, Any]:
        return BASES[self.base] | self.changes

    def run_config(self, nested: Collection[str]) -> dict[str, Any]:
        """The content of a run_config.yaml; newer ones have some fields in a `transformer`."""
        model = self.settings
        if self.base == "bridge llama" and "_target_" not in self.changes:
            inner = {name: model.pop(name) for name in list(model) if name in nested}
            inner["_target_"] = "megatron.bridge.models.transformer_config.TransformerConfig"
            target = "megatron.training.models.gpt.GPTModelConfig"
            model |= {"_target_": target, "transformer": inner}
        return {"model": model}


def draw(seed: int, *, defaults: dict[str, Any]) -> Drawn:
    """The configuration of a seed.

    `defaults` are those of the fields of the installed TransformerConfig: a harmless one among
    them gets a value of its type.
    """
    chance = random.Random(seed)
    base = chance.choice(sorted(BASES))
    kind = base.split()[0]
    run = _OF_BRIDGE if kind == "bridge" else _OF_ARGUMENTS
    changes: dict[str, Any] = {}
    for _ in range(chance.randint(1, 4)):
        match chance.choices(
            ("run", "together", "harmless", "refused", "unknown"), (6, 2, 3, 1, 0.2)
        ):
            case ["run"]:
                name = chance.choice(sorted(run))
                changes[name] = chance.choice(run[name])
            case ["together"]:
                changes |= chance.choice(_TOGETHER[kind])
            case ["harmless"]:
                name = chance.choice(sorted(_HARMLESS))
                changes[name] = _other_value(chance, defaults.get(name))
            case ["refused"]:
                name = chance.choice(_REFUSED)
                if not (kind == "arguments" and name in ("_target_", "transformer_layer_spec")):
                    changes.setdefault(name, chance.choice(_ANYTHING))
            case ["foreign"]:
                other = _OF_ARGUMENTS if kind == "bridge" else _OF_BRIDGE
                name = chance.choice(sorted(set(other) - set(run)))
                if name != "activation_func":  # it tells the vocabularies apart
                    changes[name] = chance.choice(other[name])
            case _:
                changes["attention_of_tomorrow"] = chance.choice(_ANYTHING)
    return Drawn(base, changes)


def every_change(base: str) -> Iterator[Drawn]:
    """Each value of each setting that is run, alone or with what it needs."""
    kind = base.split()[0]
    for name, values in (_OF_BRIDGE if kind == "bridge" else _OF_ARGUMENTS).items():
        for value in values:
            yield Drawn(base, {name: value})
    for changes in _TOGETHER[kind]:
        yield Drawn(base, changes)


def _other_value(chance: random.Random, default: Any) -> Any:
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default + 1
    return chance.choice(_ANYTHING)
