"""Fields of config.json against transformers' own configuration classes."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.generation import GenerationConfig

from sps2_mega.checkpoint.huggingface.config import (
    ARCHITECTURES,
    model_config_from_hf,
    model_config_to_hf,
)
from sps2_mega.checkpoint.huggingface.fields import (
    HARMLESS,
    NOT_READ,
    READ_WITHOUT_EFFECT,
    known_fields,
)
from sps2_mega.errors import ConfigError

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_field_of_the_installed_transformers_is_known(family: str) -> None:
    config = CONFIG_MAPPING[family]
    declared = {field.name for field in dataclasses.fields(config)}
    assert declared | config().to_dict().keys() <= known_fields(family)
    assert model_config_from_hf(
        CONFIG_MAPPING[family](num_hidden_layers=2).to_dict()  # n_layer has a default
    )


@pytest.fixture(scope="module")
def looked_at() -> set[str]:
    """Every attribute of a configuration at which transformers looks to make logits."""
    names: set[str] = set()
    plain = PreTrainedConfig.__getattribute__

    def traced(self: PreTrainedConfig, name: str) -> Any:
        names.add(name)
        return plain(self, name)

    with pytest.MonkeyPatch.context() as patch:
        for family in ARCHITECTURES:
            own = {"n_layer": 2, "n_embd": 32, "n_head": 4} if family == "gpt2" else TINY
            config = CONFIG_MAPPING[family](**own | {"vocab_size": 50})
            patch.setattr(PreTrainedConfig, "__getattribute__", traced)
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                model(torch.arange(9)[None])
            patch.undo()
    return names


def test_fields_that_are_called_unread_are_unread(looked_at: set[str]) -> None:
    unread = {name for names in NOT_READ.values() for name in names.split()}
    # What `to_dict` and the choice of a class look at decides nothing in the class itself.
    assert looked_at & unread <= {"model_type", "transformers_version"}
    read = {name for names in READ_WITHOUT_EFFECT.values() for name in names.split()}
    assert read <= looked_at


def test_generation_fields_that_transformers_drops_are_harmless() -> None:
    assert GenerationConfig._get_default_generation_params().keys() <= HARMLESS


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": YARN},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": YARN, "rope_theta": 2e4},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {**YARN, "rope_theta": 3e4}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 2e4},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=repr,
)
def test_both_rotary_fields_are_weighed_as_transformers_does(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | fields))
    wanted = AutoConfig.from_pretrained(tmp_path).rope_parameters
    rope = model_config_from_hf(TINY | fields).rope
    assert rope is not None
    assert rope.theta == wanted["rope_theta"]
    assert rope.scaling.replace("none", "default") == wanted["rope_type"]
    assert rope.factor == wanted.get("factor", 1.0)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_layer_types_decide_the_window_of_mistral(kind: str, tmp_path: Path) -> None:
    fields = TINY | {"model_type": "mistral", "sliding_window": 4, "head_dim": 8}
    fields |= {"initializer_range": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"layer_types": [kind] * 2}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits, changed = (
            model(ids).logits,
            model(torch.cat((ids[:, :1] + 1, ids[:, 1:]), 1)).logits,
        )
    # Two layers of window 4 reach 6 tokens back: the first token matters at
    # the last position only where there is no window.
    reaches = not torch.equal(logits[0, -1], changed[0, -1])
    config = model_config_from_hf(fields | {"layer_types": [kind] * 2})
    assert (config.sliding_window is None) == reaches


def test_fields_of_published_folders_are_accepted() -> None:
    # As in DeepSeek-R1-Distill-Qwen, SmolLM2 and distilgpt2.
    stray = {"use_mrope": False, "rope_interleaved": False, "is_llama_config": True}
    plain = model_config_from_hf(TINY)
    assert model_config_from_hf(TINY | stray | {"_num_labels": 1, "pretraining_tp": 1}) == plain


@pytest.mark.parametrize("name", ["sliding_window", "use_sliding_window", "odd_field"])
def test_a_field_that_the_family_does_not_know_is_refused(name: str) -> None:
    assert model_config_from_hf(TINY | {name: None})
    with pytest.raises(ConfigError, match=name):
        model_config_from_hf(TINY | {name: 4})


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_written_rotary_fields_mean_the_same_to_transformers(theta: float, tmp_path: Path) -> None:
    config = model_config_from_hf(TINY | {"rope_theta": theta, "rope_scaling": YARN})
    (tmp_path / "config.json").write_text(json.dumps(model_config_to_hf(config)))
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (read["rope_theta"], read["rope_type"], read["factor"]) == (theta, "yarn", 4.0)


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 10**40, 0.0, 0.5, -2.5, float("nan"), float("inf")),
    *("", "x", "gelu", "\n", [], [1], ["x"], [None], {}, {"a": 1}, {"rope_type": "yarn"}),
    *({"factor": "x"}, {"rope_type": [], "factor": 1.0}, {"rope_type": "llama3", "factor": None}),
)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_random_fields_make_a_model_or_one_line(family: str) -> None:
    rng = random.Random(family)
    sound = CONFIG_MAPPING[family](num_hidden_layers=2).to_dict() | {"rope_scaling": None}
    names = sorted(known_fields(family) - {"model_type"} | {"odd"})
    for _ in range(600):
        changes = {name: rng.choice(VALUES) for name in rng.sample(names, rng.choice((1, 1, 2)))}
        try:
            model_config_from_hf(sound | changes)
        except ConfigError as error:
            assert "\n" not in str(error)
