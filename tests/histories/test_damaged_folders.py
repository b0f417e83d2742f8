"""Damaged Hugging Face folders: each ends in one line that names the file or field, and at once."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from unit.checkpoint.checkpoints import LLAMA, MemorySource, write_hf

from sps2_mega.checkpoint.architecture import model_config_to_mapping
from sps2_mega.checkpoint.huggingface import layout as hf_layout
from sps2_mega.checkpoint.load import load_weights
from sps2_mega.checkpoint.model_file import read_model_file
from sps2_mega.checkpoint.resolve import resolve_model
from sps2_mega.checkpoint.sharding import local_shapes
from sps2_mega.checkpoint.source import open_checkpoint
from sps2_mega.cli import inspect_checkpoint
from sps2_mega.errors import CheckpointError, ConfigError

NAN, INF = float("nan"), float("inf")
LIMIT_S = 10.0
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
WRONG_SIZES: tuple[Any, ...] = ("x", "2", 0, -5, 4096.5, True, [2], 2**70)
YARN = {"rope_type": "yarn", "factor": 4.0}
FIELDS: list[tuple[str, Any]] = [
    *((name, value) for name in SIZES for value in WRONG_SIZES),
    ("head_dim", 5),
    ("num_hidden_layers", 10**6),
    ("hidden_size", 10**9),
    ("vocab_size", 10**12),
    ("vocab_size", None),
    ("hidden_size", None),
    *(("rms_norm_eps", value) for value in ("abc", -1.0, NAN, INF, None, 1, [1e-5])),
    *(("eos_token_id", value) for value in ("x", -1, 1.5, True, ["x"], {})),
    *(("bos_token_id", value) for value in ("x", -1, [1])),
    *(("layer_types", value) for value in (5, "full_attention", [5], ["odd"] * 3)),
    ("layer_types", ["full_attention"] * 2),
    ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
    *(("tie_word_embeddings", value) for value in ("yes", 1, None)),
    *(("model_type", value) for value in (None, 5, ["llama"], "bert")),
    *(("dtype", value) for value in (5, "int8", "float64")),
    *(("hidden_act", value) for value in (5, "gelu")),
    *(("is_causal", value) for value in (False, "no")),
    *(("rope_theta", value) for value in ("x", 0, -1.0, NAN)),
    *(("rope_scaling", value) for value in (5, "yarn", ["yarn"])),
    ("rope_scaling", {"full_attention": YARN, "sliding_attention": YARN}),
    ("rope_scaling", YARN | {"beta_slow": -1}),
    ("rope_scaling", YARN | {"beta_fast": "x"}),
    ("rope_scaling", YARN | {"factor": 0}),
    ("rope_scaling", YARN | {"truncate": "no"}),
    ("rope_scaling", YARN | {"original_max_position_embeddings": 0.5}),
    ("rope_scaling", {"rope_type": 5}),
    ("quantization_config", {"bits": 4}),
    ("attn_logit_softcapping", 30.0),
    ("final_logit_softcapping", 30.0),
    ("attention_multiplier", 2.0),
    ("logits_scaling", 8.0),
    ("residual_multiplier", 0.2),
    ("use_mrope", True),
    ("num_local_experts", 8),
    ("transformers_weights", "other.safetensors"),
    ("pruned_heads", {"0": [1]}),
]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """No case, whatever it is, takes longer than `LIMIT_S`."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < LIMIT_S


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder of three layers."""
    source, tensors = MemorySource(LLAMA), {}
    for name, recipe in hf_layout.recipes(LLAMA).items():
        for part, tensor in hf_layout.split(recipe, source.read(name), LLAMA):
            tensors[part if part.startswith("lm_head") else f"model.{part}"] = tensor
    return write_hf(tmp_path_factory.mktemp("sound") / "hf", LLAMA, tensors)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "hf"))


def load(folder: Path) -> None:
    """Open, check and load, as the commands do."""
    config = resolve_model(folder).config
    parameters = {name: torch.empty(shape) for name, shape in local_shapes(config, 1).items()}
    load_weights(parameters, open_checkpoint(folder), config, tp_rank=0, tp=1)


def refusal(folder: Path) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_sound_folder_loads(folder: Path) -> None:
    load(folder)


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=lambda x: repr(x)[:40])
def test_a_wrong_field_is_named(folder: Path, field: str, value: Any) -> None:
    change(folder / "config.json", **{field: value})
    message = refusal(folder)
    assert "config.json" in message
    assert field in message


@pytest.mark.parametrize("value", ["x", -1, 1.5, ["x"], {}])
def test_wrong_end_tokens_of_generation_are_named(folder: Path, value: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert "generation_config.json: eos_token_id" in refusal(folder)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


CONTENTS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text('{"model_type": "lla'),
    "list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "deep object": lambda path: path.write_text('{"a":' * 100_000),
    "digits": lambda path: path.write_text('{"vocab_size": ' + "9" * 5000 + "}"),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "huge": _huge,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "fifo": _fifo,
    "loop": _loop,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_json_file_is_named(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink(missing_ok=True)
    CONTENTS[kind](folder / name)
    if name == "config.json":
        assert refusal(folder)
    else:
        assert name in refusal(folder)


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_damaged_weights_file_is_named(folder: Path, kind: str) -> None:
    (folder / "model.safetensors").unlink()
    CONTENTS[kind](folder / "model.safetensors")
    assert "safetensors" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1000, -1])
def test_a_cut_weights_file_is_named(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, kept if kept >= 0 else size + kept)
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "weight_map",
    [None, 5, [], {}, {"model.norm.weight": 5}, {"model.norm.weight": "absent.safetensors"}],
    ids=repr,
)
def test_a_wrong_index_is_named(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert index.name in refusal(folder)


def test_a_tensor_that_its_shard_lacks_is_named(folder: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / shard)
    index = {"weight_map": dict.fromkeys([*names, "model.extra"], shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.extra" in refusal(folder)
    del index["weight_map"]["model.extra"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load(folder)
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.norm.weight" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float64])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_of_another_type_is_named(folder: Path, name: str, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(dtype)}, path)
    assert name in refusal(folder)


@pytest.mark.parametrize("damage", ["absent", "extra", "rows", "dimensions"])
def test_a_tensor_that_does_not_fit_is_named(folder: Path, damage: str) -> None:
    path, name = folder / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    tensor = tensors.pop(name)
    if damage == "extra":
        tensors |= {name: tensor, "model.layers.3.mlp.down_proj.weight": tensor.clone()}
    elif damage == "rows":
        tensors[name] = tensor[1:].clone()
    elif damage == "dimensions":
        tensors[name] = tensor[None].clone()
    save_file(tensors, path)
    assert "mlp." in refusal(folder)


WRONG_ARCHITECTURE: list[tuple[str, Any]] = [
    ("num_layers", 10**6),
    ("hidden_size", 2**70),
    ("vocab_size", 0),
    ("vocab_size", 10**12),
    ("max_position_embeddings", -5),
    ("max_position_embeddings", 4096.5),
    ("norm_eps", NAN),
    ("norm_eps", -1.0),
    ("eos_token_ids", ["x"]),
    ("head_dim", "x"),
    ("rope", {"theta": 0.0}),
    ("rope", {"theta": INF}),
]


@pytest.mark.parametrize(("field", "value"), WRONG_ARCHITECTURE, ids=repr)
def test_a_wrong_field_of_a_model_file_is_named(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "model.yaml"
    architecture = model_config_to_mapping(LLAMA) | {field: value}
    path.write_text(yaml.safe_dump({"architecture": architecture, "source": "here"}))
    with pytest.raises(ConfigError) as caught:
        read_model_file(path)
    assert f"{path}: architecture" in str(caught.value)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_damaged_model_file_is_named(tmp_path: Path, kind: str) -> None:
    CONTENTS[kind](tmp_path / "model.yaml")
    with pytest.raises(ConfigError, match=r"model\.yaml") as caught:
        read_model_file(tmp_path / "model.yaml")
    assert "\n" not in str(caught.value)


def test_only_the_files_of_the_model_are_read(folder: Path) -> None:
    for name in ("consolidated", "adapter_model", "model.fp16", "model-00001-of-00002"):
        (folder / f"{name}.safetensors").write_bytes(b"no weights")
    (folder / "model.safetensors.index.json").write_text("stale")
    load(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in refusal(folder)
    (folder / "config.json").unlink()
    assert "merge_and_unload" in refusal(folder)


def test_other_weights_are_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert "consolidated.safetensors" in refusal(folder)


def test_the_command_ends_with_2_and_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder / "config.json", rms_norm_eps="abc")
    assert inspect_checkpoint.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rms_norm_eps='abc'" in error
