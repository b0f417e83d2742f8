"""Resolution of a user's model name to configuration, weights and tokenizer; strict model files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml
from unit.checkpoint.checkpoints import LLAMA, MemorySource

from sps2_mega.checkpoint.architecture import (
    model_config_from_mapping,
    model_config_to_mapping,
)
from sps2_mega.checkpoint.export import export_huggingface, export_megatron
from sps2_mega.checkpoint.model_file import model_files, read_model_file
from sps2_mega.checkpoint.resolve import resolve_model, suggested_csa
from sps2_mega.config import CSAConfig
from sps2_mega.errors import CheckpointError, ConfigError

MODEL_CONFIGS = Path(__file__).resolve().parents[3] / "model_configs"


def write(path: Path, **changes: Any) -> Path:
    content = {"architecture": model_config_to_mapping(LLAMA), "source": "somewhere"} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v != "absent"}))
    return path


def test_the_bundled_model_is_found_by_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = resolve_model("sps2-tiny")
    assert model.path == model.tokenizer == MODEL_CONFIGS / "sps2-tiny"
    assert (model.name, model.suggested_tp, model.suggested_sp) == ("sps2-tiny", 1, 2)
    assert resolve_model(model.path).config == model.config


def test_a_folder_is_resolved_whatever_its_format(tmp_path: Path) -> None:
    export_huggingface(MemorySource(LLAMA), tmp_path / "hf")
    assert resolve_model(tmp_path / "hf").tokenizer is None
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.save(str(tmp_path / "hf" / "tokenizer.json"))
    export_megatron(MemorySource(LLAMA), tmp_path / "megatron")
    for name in ("hf", "megatron", "megatron/release"):
        model = resolve_model(str(tmp_path / name), tokenizer=tmp_path / "hf")
        assert (model.config, model.tokenizer) == (LLAMA, tmp_path / "hf")
    assert resolve_model(tmp_path / "hf").tokenizer == tmp_path / "hf"


def test_a_tokenizer_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of tokenizer\.json"):
        resolve_model("sps2-tiny", tokenizer=tmp_path)


def test_a_model_without_weights_says_where_they_are() -> None:
    with pytest.raises(ConfigError, match=r"llama-3-8b are not bundled.*https://.*pass the folder"):
        resolve_model("llama-3-8b")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'lama' is not a folder.*sps2-tiny.*yi-34b"):
        resolve_model("lama")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a known checkpoint"):
        resolve_model(tmp_path)


def test_files_of_the_current_folder_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_huggingface(MemorySource(LLAMA), tmp_path / "weights")
    write(tmp_path / "model_configs" / "mine.yaml", weights="../weights")
    write(tmp_path / "model_configs" / "gpt2.yaml", weights="nowhere", suggested={"tp": 2})
    monkeypatch.chdir(tmp_path)
    assert resolve_model("mine").path == tmp_path / "weights"
    assert {"mine", "gpt2", "yi-34b"} <= set(model_files())
    with pytest.raises(ConfigError, match=r"weights of gpt2 are not in .*nowhere"):
        resolve_model("gpt2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wieghts": "x"}, r"unknown wieghts \(known: architecture, weights"),
        ({"source": "absent"}, "needs source"),
        ({"architecture": [1]}, "architecture must be a mapping"),
        ({"architecture": {"family": "llama"}}, "needs num_layers, hidden_size"),
        ({"suggested": {"pp": 2}}, r"unknown pp \(known: tp, sp\)"),
        ({"suggested": {"tp": 0}}, "tp must be an integer >= 1, found 0"),
        ({"weights": 3}, "weights must be a folder or null"),
    ],
)
def test_a_wrong_model_file_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_model_file(write(tmp_path / "x.yaml", **changes))
    assert "x.yaml" in str(caught.value)


def test_a_model_file_may_suggest_sparse_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_huggingface(MemorySource(LLAMA), tmp_path / "weights")
    section = {"degrees": [1, 4], "spans": [512], "halo": 64}
    write(tmp_path / "model_configs" / "mine.yaml", weights="../weights", csa=section)
    suggested = CSAConfig(degrees=(1, 4), spans=(512,), halo=64)
    assert resolve_model("mine").csa == suggested == suggested_csa("mine")
    assert suggested_csa(tmp_path / "weights") is None and suggested_csa("sps2-tiny") is None
    # Without flags the file's values apply; given degrees replace all of
    # the file's, other flags single values.
    assert CSAConfig().over(suggested) == suggested
    assert CSAConfig(degrees=(1,)).over(suggested) == CSAConfig(degrees=(1,))
    assert CSAConfig(tail=9).over(suggested) == suggested.replace(tail=9)
    assert CSAConfig().over(None) == CSAConfig(degrees=(1,)) and CSAConfig().exact


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"spans": [8]}, "csa: needs degrees"),
        ({"degrees": 4}, "degrees must be a list of integers, found 4"),
        ({"degrees": [1, 0]}, "degrees must be an integer >= 1, found 0"),
        ({"degrees": [1, 2], "halo": -1}, "halo must be an integer >= 0, found -1"),
        ({"degrees": [1, 2], "sample_queries": 1}, "sample_queries must be true or false"),
        ({"degrees": [1, 2], "stride": 3}, "stride"),
        ([1, 4], "csa must be a mapping"),
    ],
)
def test_a_wrong_sparse_section_is_refused(tmp_path: Path, section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_model_file(write(tmp_path / "m.yaml", csa=section))


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"cannot read .*x\.yaml"):
        read_model_file(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("just text")
    with pytest.raises(ConfigError, match="must be a mapping"):
        read_model_file(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "32", "hidden_size must be int, found '32'"),
        ("hidden_size", True, "hidden_size must be int, found True"),
        ("norm_eps", "1e-5", r"norm_eps must be float, found '1e-5' \(write a float as 1.0e-5\)"),
        ("norm", "batchnorm", "norm must be 'rmsnorm' or 'layernorm', found 'batchnorm'"),
        ("eos_token_ids", ["a"], "eos_token_ids must be int, found 'a'"),
        ("eos_token_ids", 3, "eos_token_ids must be a list of int, found 3"),
        ("rope", 3, "rope must be RopeConfig or null"),
        ("rope", {"base": 3}, r"rope: unknown base \(known: theta"),
        ("num_kv_heads", 4, r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)"),
    ],
)
def test_a_mistyped_field_is_named(field: str, value: Any, message: str) -> None:
    fields = model_config_to_mapping(LLAMA) | {field: value}
    with pytest.raises(ConfigError, match=message):
        model_config_from_mapping(fields, "here")


def test_integers_may_stand_for_floats() -> None:
    fields = model_config_to_mapping(LLAMA) | {"rope": {"theta": 10000}}
    config = model_config_from_mapping(fields, "here")
    assert config == LLAMA
    assert isinstance(config.rope.theta, float)  # type: ignore[union-attr]


def test_where_no_weights_are_needed_a_config_or_a_name_will_do(tmp_path: Path) -> None:
    export_huggingface(MemorySource(LLAMA), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert resolve_model(tmp_path, needs_weights=False).config == LLAMA
    with pytest.raises(CheckpointError, match="safetensors"):
        resolve_model(tmp_path)
    assert resolve_model("llama-3-8b", needs_weights=False).config.num_layers == 32
