"""Hybrid checkpoints: patterns of attention and MLP as layers of a GPT, all others refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from unit.checkpoint.checkpoints import LLAMA, MemorySource

from sps2_mega.checkpoint.inventory import check_complete
from sps2_mega.checkpoint.load import load_weights
from sps2_mega.checkpoint.megatron.hybrid import HybridSource
from sps2_mega.checkpoint.megatron.run import architecture_of
from sps2_mega.checkpoint.megatron.settings.arguments import OWN_CONFIG, model_config_to_args
from sps2_mega.checkpoint.megatron.settings.hybrid import HybridPattern, hybrid_pattern
from sps2_mega.checkpoint.sharding import local_shapes
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError, ConfigError

ATTENTION = ("input_layernorm.", "self_attention.")


def pattern_of(text: str) -> HybridPattern:
    pattern = hybrid_pattern({"hybrid_layer_pattern": text}, "args")
    assert pattern is not None
    return pattern


class Sublayers(MemorySource):
    """Random weights of a hybrid, under numbers of sublayers and its own name of the last norm."""

    def __init__(self, config: ModelConfig, pattern: str) -> None:
        symbols = pattern.replace("|", "")
        super().__init__(replace(config, num_layers=len(symbols)))
        self.config = replace(config, num_layers=pattern_of(pattern).num_layers)
        self.gpt: dict[str, torch.Tensor] = {}
        for name, tensor in list(self.weights.items()):
            number, part = number_and_part(name)
            if number is not None and part.startswith(ATTENTION) != (symbols[number] == "*"):
                del self.weights[name]
            elif "final_layernorm" in name:
                self.weights[name.replace("final_layernorm", "final_norm")] = tensor
                del self.weights[name]


def number_and_part(name: str) -> tuple[int | None, str]:
    if not name.startswith("decoder.layers."):
        return None, name
    number, _, part = name.removeprefix("decoder.layers.").partition(".")
    return int(number), part


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("*-*-*-", [(0, 1), (2, 3), (4, 5)]),
        ("*-|*-", [(0, 1), (2, 3)]),
        ("**-", [(0, None), (1, 2)]),
        ("-*", [(None, 0), (1, None)]),
        ("*--*", [(0, 1), (None, 2), (3, None)]),
    ],
)
def test_every_sublayer_is_read_and_absent_ones_add_nothing(
    text: str, layers: list[tuple[int | None, int | None]]
) -> None:
    source = Sublayers(LLAMA, text)
    hybrid = HybridSource(source, pattern_of(text))
    config = hybrid.config
    assert config.num_layers == len(layers)
    check_complete(hybrid, config)
    parameters = {
        name: torch.full(shape, torch.nan, dtype=torch.bfloat16)
        for name, shape in local_shapes(config, 2).items()
    }
    load_weights(parameters, hybrid, config, tp_rank=1, tp=2)
    for index, (attention, mlp) in enumerate(layers):
        for name in (n for n in parameters if n.startswith(f"decoder.layers.{index}.")):
            _, part = number_and_part(name)
            stored = attention if part.startswith(ATTENTION) else mlp
            if stored is None:
                value = 1.0 if part.endswith("layernorm.weight") else 0.0
                assert (hybrid.read(name) == value).all()
                assert (parameters[name] == value).all()
            else:
                expected = source.weights[f"decoder.layers.{stored}.{part}"]
                assert torch.equal(hybrid.read(name), expected)
    expected = source.weights["decoder.final_norm.weight"]
    assert torch.equal(parameters["decoder.final_layernorm.weight"], expected)
    assert not any(tensor.isnan().any() for tensor in parameters.values())


def hybrid_args(**changes: Any) -> dict[str, Any]:
    args = vars(model_config_to_args(LLAMA, padded_vocab=128)) | {
        "num_layers": 6,
        "hybrid_layer_pattern": "*-*-*-",
        "is_hybrid_model": True,
        "spec": ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],
    }
    del args[OWN_CONFIG]
    return args | changes


def test_the_architecture_is_that_of_the_gpt() -> None:
    config, pattern = architecture_of(hybrid_args(), None, None, "args")
    assert config == replace(LLAMA, eos_token_ids=config.eos_token_ids)
    assert pattern == pattern_of("*-*-*-")
    older = hybrid_args(hybrid_layer_pattern=None, hybrid_override_pattern="*-*-*-")
    assert architecture_of(older, None, None, "args") == (config, pattern)
    with pytest.raises(ConfigError, match=r"makes 3 layers, the given .* num_layers=2"):
        architecture_of(hybrid_args(), replace(LLAMA, num_layers=2), None, "args")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hybrid_layer_pattern": "M*-"}, r"hybrid_layer_pattern='M\*-' .*'M' \(Mamba\)"),
        ({"hybrid_layer_pattern": "*E"}, r"'E' \(experts\)"),
        ({"hybrid_layer_pattern": "*-/*-"}, r"'/' \(multi-token prediction\)"),
        ({"hybrid_layer_pattern": "*-x"}, r"'x' \(which is unknown\)"),
        ({"hybrid_layer_pattern": ["*", "-"]}, "needs a text"),
        ({"hybrid_layer_pattern": None, "hybrid_attention_ratio": 0.1}, "hybrid_attention_ratio"),
        ({"qk_layernorm": True}, "qk_layernorm=True"),
        ({"window_size": (7, 0)}, "window_size"),
        ({"spec": ["own.module", "spec"]}, "spec="),
        ({"num_experts": 4}, "num_experts=4"),
    ],
)
def test_other_hybrids_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        architecture_of(hybrid_args(**changes), None, None, "args")


def test_a_weight_that_the_pattern_lacks_is_an_error() -> None:
    source = Sublayers(LLAMA, "*-*-")
    with pytest.raises(CheckpointError, match="has no such weight"):
        HybridSource(source, pattern_of("*-"))
