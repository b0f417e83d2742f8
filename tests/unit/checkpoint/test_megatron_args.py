"""Megatron's stored arguments -> ModelConfig: switches, old defaults, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from unit.checkpoint.checkpoints import CONFIGS

from sps2_mega.checkpoint.megatron.settings.arguments import (
    OWN_CONFIG,
    model_config_from_args,
    model_config_to_args,
    saved_layout,
)
from sps2_mega.config import RopeConfig
from sps2_mega.errors import ConfigError

ARGS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "padded_vocab_size": 256,
    "max_position_embeddings": 128,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
}


def read(**changes: Any):
    return model_config_from_args(ARGS | changes, "args")


def test_silence_means_megatrons_defaults() -> None:
    config = read()
    assert (config.family, config.num_kv_heads, config.head_dim) == ("llama", 4, 8)
    assert (config.ffn_hidden_size, config.vocab_size, config.dtype) == (128, 256, "float32")
    assert config.rope == RopeConfig(theta=10000.0)


def test_query_groups_count_only_when_they_are_switched_on() -> None:
    assert read(num_query_groups=1).num_kv_heads == 4
    assert read(num_query_groups=2, group_query_attention=True).num_kv_heads == 2


def test_the_true_vocabulary_is_preferred_to_the_padded_one() -> None:
    assert read(vocab_size=250).vocab_size == 250


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({}, "silu_gated"),
        ({"swiglu": False}, "gelu"),
        ({"swiglu": False, "add_bias_linear": True}, "gelu_tanh"),  # the fused kernel
        ({"swiglu": False, "add_bias_linear": True, "bias_gelu_fusion": False}, "gelu"),
        (
            {
                "swiglu": False,
                "add_bias_linear": True,
                "bias_gelu_fusion": True,
                "openai_gelu": True,
            },
            "gelu_tanh",
        ),
        ({"swiglu": False, "squared_relu": True}, "squared_relu"),
        ({"swiglu": False, "quick_geglu": True}, "quick_gelu_gated"),
    ],
)
def test_the_activation_is_the_one_that_was_computed(
    changes: dict[str, Any], activation: str
) -> None:
    assert read(**changes).activation == activation


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"position_embedding_type": "learned_absolute"}, "gpt2"),
        ({"qk_layernorm": True}, "qwen3"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"window_size": (15, 0)}, "mistral"),
    ],
)
def test_the_family_follows_from_the_switches(changes: dict[str, Any], family: str) -> None:
    assert read(**changes).family == family


def test_windows_count_the_token_itself() -> None:
    assert read(window_size=(15, 0)).sliding_window == 16


def test_rotary_scaling_is_read() -> None:
    assert read(use_rope_scaling=True, rotary_base=500000).rope == RopeConfig(
        theta=5e5,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    assert read(rotary_percent=0.5).rope == RopeConfig(rotary_dim=4)
    assert read(rotary_interleaved=True).rope == RopeConfig(interleaved=True)
    yarn = read(position_embedding_type="yarn", rotary_scaling_factor=4.0, mscale_all_dim=1.0)
    assert yarn.rope == RopeConfig(
        scaling="yarn", factor=4.0, original_max_position_embeddings=4096, attention_factor=1.0
    )


def test_the_older_switch_of_rotary_positions_counts() -> None:
    args = {k: v for k, v in ARGS.items() if k != "position_embedding_type"}
    config = model_config_from_args(args | {"use_rotary_position_embeddings": True}, "args")
    assert config.rope == RopeConfig()


def test_layers_without_rotation_are_counted_as_megatron_does() -> None:
    assert read(no_rope_freq=2).no_rope_layers == (1, 3)
    assert read(no_rope_freq=[0, 0, 0, 1]).no_rope_layers == (3,)
    assert read(no_rope_freq=0).no_rope_layers == ()


def test_the_norm_without_weights_replaces_the_one_with() -> None:
    config = read(qk_l2_norm=True, qk_layernorm=True)
    assert (config.qk_l2_norm, config.qk_norm) == (True, False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": 8}, "num_experts=8"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"rotary_percent": 0.4}, "rotary_percent=0.4"),
        ({"squared_relu": True}, "swiglu and squared_relu"),
        ({"swiglu": False, "openai_gelu": True}, "openai_gelu=True"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "rope_scaling_factor=32.0"),
        ({"rotary_seq_len_interpolation_factor": 2}, "rotary_seq_len_interpolation_factor=2"),
        ({"qk_l2_norm": True, "transformer_impl": "local"}, "qk_l2_norm=True"),
        ({"no_rope_freq": 3}, "no_rope_freq=3"),
        ({"rope_type": "yarn"}, "rope_type='yarn'"),
        ({"softmax_scale": -1.0}, "softmax_scale must be a number above 0"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p=True"),
        ({"normalization": "Other"}, "normalization='Other'"),
        ({"position_embedding_type": "mrope"}, "position_embedding_type='mrope'"),
        ({"window_size": (15, 3)}, "window_size=(15, 3)"),
        ({"num_layers": None}, "num_layers"),
        ({"rope_scaling": True}, "rope_scaling=True"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_arguments_say_the_same_with_and_without_our_own_entry(name: str) -> None:
    config = CONFIGS[name]
    args = vars(model_config_to_args(config, padded_vocab=128))
    assert model_config_from_args(args, "args") == config
    del args[OWN_CONFIG]
    again = model_config_from_args(args, "args")
    # Megatron's switches have no place for these.
    lost = {"family", "eos_token_ids", "bos_token_id"} | ({"rope"} if name == "qwen2" else set())
    for field in config.__dataclass_fields__:
        if field not in lost:
            assert getattr(again, field) == getattr(config, field), field


def test_the_layout_is_none_where_it_is_not_recorded() -> None:
    assert saved_layout({}) is None
    assert saved_layout({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}) == (
        4,
        2,
    )
