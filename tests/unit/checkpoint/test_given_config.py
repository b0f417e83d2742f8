"""Architectures that a user gives, for folders that state none or a wrong one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizer_samples as samples
import torch
import yaml
from unit.checkpoint.checkpoints import LLAMA, MemorySource, write_megatron

from sps2_mega.checkpoint.architecture import model_config_to_mapping
from sps2_mega.checkpoint.export import export_huggingface, export_megatron
from sps2_mega.checkpoint.given_config import given_config
from sps2_mega.checkpoint.huggingface.config import model_config_to_hf
from sps2_mega.checkpoint.resolve import resolve_model
from sps2_mega.checkpoint.source import open_checkpoint, read_canonical
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError, ConfigError


def write_yaml(path: Path, config: ModelConfig, **changes: Any) -> Path:
    fields = model_config_to_mapping(config) | changes
    path.write_text(yaml.safe_dump({"architecture": fields, "source": "a run of ours"}))
    return path


def write_json(path: Path, config: ModelConfig, **changes: Any) -> Path:
    path.write_text(json.dumps(model_config_to_hf(config) | changes))
    return path


def torch_dist(root: Path) -> Path:
    export_megatron(MemorySource(LLAMA), root)
    (root / "release" / "common.pt").unlink()
    return root


def legacy(root: Path) -> Path:
    folder = root / "mp_rank_00"
    folder.mkdir(parents=True)
    state = {"checkpoint_version": 3.0, "iteration": 7, "model": MemorySource(LLAMA).weights}
    torch.save(state, folder / "model_optim_rng.pt")
    return root


def bridge_of_another_class(root: Path) -> Path:
    folder = torch_dist(root) / "release"
    section = {"_target_": "megatron.bridge.models.gemma.Gemma3ModelProvider"}
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": section}))
    return root


def unknown_type(root: Path) -> Path:
    export_huggingface(MemorySource(LLAMA), root)
    (root / "config.json").write_text(json.dumps({"model_type": "ours"}))
    return root


def no_json(root: Path) -> Path:
    (unknown_type(root) / "config.json").write_text("{")
    return root


def no_config(root: Path) -> Path:
    (unknown_type(root) / "config.json").unlink()
    return root


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (torch_dist, "--config NAME|FILE"),
        (legacy, "--config NAME|FILE"),
        (bridge_of_another_class, "Gemma3ModelProvider"),
        (unknown_type, "model_type='ours'"),
        (no_json, "cannot read"),
        (no_config, "--config NAME|FILE"),
    ],
)
def test_a_folder_runs_with_a_given_architecture(tmp_path: Path, write, message: str) -> None:
    folder = write(tmp_path / "model")
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        resolve_model(folder)
    assert message in str(caught.value)
    given = write_yaml(tmp_path / "given.yaml", LLAMA)
    for file in (given, write_json(tmp_path / "given.json", LLAMA)):
        model = resolve_model(folder, config=file)
        assert model.config == LLAMA
        source = open_checkpoint(model.path, model.config)
        for name, tensor in MemorySource(LLAMA).weights.items():
            assert torch.equal(read_canonical(source, name, LLAMA), tensor), name
    narrow = write_yaml(tmp_path / "narrow.yaml", LLAMA, ffn_hidden_size=24)
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*linear_fc1"):
        resolve_model(folder, config=narrow)


def test_end_tokens_and_tokenizer_are_still_the_folders(tmp_path: Path) -> None:
    folder = unknown_type(tmp_path / "model")
    given = write_yaml(tmp_path / "given.yaml", LLAMA, eos_token_ids=[3])
    assert resolve_model(folder, config=given).config.eos_token_ids == (3,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 5]}')
    assert resolve_model(folder, config=given).config.eos_token_ids == (9, 5)
    tokens = samples.save(samples.byte_level(), tmp_path / "tokens")
    with pytest.raises(ConfigError, match="the model has rows for 37"):
        resolve_model(folder, config=given, tokenizer=tokens)


def test_the_end_of_a_null_tokenizer_is_kept(tmp_path: Path) -> None:
    stored = {"tokenizer_type": "NullTokenizer", "vocab_size": 36, "norm_epsilon": "unreadable"}
    root = write_megatron(tmp_path / "m", LLAMA, rows=128, args=stored)
    given = write_yaml(tmp_path / "given.yaml", LLAMA)
    assert resolve_model(root, config=given).config == replace(LLAMA, eos_token_ids=(36,))


def test_a_given_architecture_replaces_that_of_a_name(tmp_path: Path) -> None:
    tiny = given_config("sps2-tiny")
    given = write_json(tmp_path / "given.json", replace(tiny, norm_eps=1e-6))
    model = resolve_model("sps2-tiny", config=given)
    assert model.config == replace(tiny, norm_eps=1e-6)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        resolve_model("sps2-tiny", config="gpt2")


def test_what_cannot_be_given_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.json").write_text("[")
    (tmp_path / "list.yaml").write_text("[1]")
    write_json(tmp_path / "type.json", LLAMA, model_type="ours")
    write_yaml(tmp_path / "field.yaml", LLAMA, depth=3)
    write_json(tmp_path / "heads.json", LLAMA, num_attention_heads="six")
    for given, message in {
        "lama-3": r"no name in model_configs/ \(gpt2, llama-2-7b",
        "nowhere.yaml": "there is no such file",
        "some/where": "there is no such file",
        "folder": "it is a folder: a file is needed",
        "text.json": r"cannot read text\.json",
        "list.yaml": "must be a mapping",
        "type.json": "model_type='ours' is not supported",
        "field.yaml": "unknown depth",
        "heads.json": "num_attention_heads='six'",
    }.items():
        with pytest.raises(ConfigError, match=f"^--config {given}: .*{message}") as caught:
            given_config(given)
        assert "\n" not in str(caught.value)
