"""config.json <-> ModelConfig: both spellings, defaults, refusals by field and value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sps2_mega.checkpoint.huggingface.config import (
    model_config_from_hf,
    model_config_to_hf,
    read_hf_config,
)
from sps2_mega.checkpoint.model_file import read_model_file
from sps2_mega.config import RopeConfig
from sps2_mega.errors import ConfigError

MODEL_CONFIGS = Path(__file__).resolve().parents[3] / "model_configs"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}


@pytest.mark.parametrize("path", sorted(MODEL_CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_bundled_architecture_survives_the_round_trip(path: Path) -> None:
    config = read_model_file(path).config
    assert model_config_from_hf(json.loads(json.dumps(model_config_to_hf(config)))) == config


def test_silence_means_what_transformers_assumes() -> None:
    config = model_config_from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 8, 1e-6)
    assert (config.max_position_embeddings, config.tie_embeddings) == (2048, False)
    assert config.rope == RopeConfig(theta=10000.0)
    assert (config.dtype, config.eos_token_ids) == ("float32", ())
    assert (
        model_config_from_hf(
            LLAMA | {"model_type": "mistral", "num_key_value_heads": 2}
        ).sliding_window
        == 4096
    )
    assert (
        model_config_from_hf(LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2}).head_dim
        == 128
    )
    gpt2 = model_config_from_hf(GPT2)
    assert (gpt2.ffn_hidden_size, gpt2.activation, gpt2.tie_embeddings) == (128, "gelu_tanh", True)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_both_spellings_of_rotary_scaling_are_read(fields: dict[str, Any]) -> None:
    assert model_config_from_hf(LLAMA | fields).rope == RopeConfig(
        theta=5e5,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def test_yarn_takes_the_original_length_from_the_context_where_it_is_absent() -> None:
    rope = model_config_from_hf(LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4}}).rope
    assert rope is not None
    assert (rope.scaling, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 2048)


def test_linear_scaling_is_read() -> None:
    rope = model_config_from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}).rope
    assert rope == RopeConfig(scaling="linear", factor=2.0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral'"),
        ({"model_type": None}, "model_type=None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 3}}, "odd=3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"torch_dtype": "float64"}, "float64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name_and_value(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config_from_hf(LLAMA | fields)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "relu"},
    ],
)
def test_gpt2_variants_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        model_config_from_hf(GPT2 | fields)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"sliding_window": 16}, None),
        ({"sliding_window": 16, "use_sliding_window": False}, None),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, None),
        (
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 3,
            },
            16,
        ),
    ],
)
def test_qwen_has_a_window_only_where_it_is_used(
    fields: dict[str, Any], window: int | None
) -> None:
    assert model_config_from_hf(QWEN2 | fields).sliding_window == window


def test_a_window_on_some_layers_is_refused() -> None:
    fields = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}
    with pytest.raises(ConfigError, match="max_window_layers=2 of 3"):
        model_config_from_hf(QWEN2 | fields)


def test_end_tokens_come_from_the_generation_config_where_it_has_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 2}))
    assert read_hf_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert read_hf_config(tmp_path).eos_token_ids == (5, 2)


def test_errors_of_a_folder_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"mlp_bias": True}))
    with pytest.raises(ConfigError, match=r"config\.json: mlp_bias=True"):
        read_hf_config(tmp_path)


def test_a_family_without_its_positions_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match="rotary"):
        model_config_to_hf(replace(model_config_from_hf(LLAMA), rope=None))
