"""HF -> Megatron -> HF is the identity bit for bit; no overwriting, no reading of half a folder."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizer_samples as samples
import torch
import yaml
from safetensors.torch import load_file
from unit.checkpoint.checkpoints import CONFIGS, LLAMA, MemorySource, write_megatron

from sps2_mega.checkpoint.canonical import canonical_shapes
from sps2_mega.checkpoint.export import export_huggingface, export_megatron
from sps2_mega.checkpoint.huggingface.writer import plan_files
from sps2_mega.checkpoint.megatron.safe_pickle import load_torch_file
from sps2_mega.checkpoint.megatron.settings.arguments import OWN_CONFIG, model_config_from_args
from sps2_mega.checkpoint.megatron.torch_dist import TorchDistSource
from sps2_mega.checkpoint.source import TRACKER, TRAIN_STATE, open_checkpoint, read_canonical
from sps2_mega.config import RopeConfig
from sps2_mega.errors import CheckpointError, ConfigError

CORE_0_19 = Path(__file__).parents[2] / "data" / "core_0_19_pp2"


@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_face_to_megatron_and_back_is_bit_exact(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    export_huggingface(MemorySource(config), tmp_path / "hf")
    export_megatron(open_checkpoint(tmp_path / "hf"), tmp_path / "megatron", file_bytes=3000)
    megatron = open_checkpoint(tmp_path / "megatron")
    assert isinstance(megatron, TorchDistSource)
    assert (megatron.config, megatron.dtype) == (config, config.dtype)
    export_huggingface(megatron, tmp_path / "again")
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("hf", "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key
    configs = [(tmp_path / x / "config.json").read_text() for x in ("hf", "again")]
    assert configs[0] == configs[1]


def core_0_19(root: Path) -> Path:
    """Written by megatron-core 0.19.2, which has no common.pt."""
    return CORE_0_19


def bridge(root: Path) -> Path:
    """As Bridge writes one: run_config.yaml, its own tracker, a tokenizer with the iteration."""
    config = replace(LLAMA, vocab_size=259)
    folder = root / "iter_0000010"
    write_megatron(root, config, rows=384, args={}).joinpath("release").rename(folder)
    (folder / "common.pt").unlink()
    (root / TRACKER).unlink()
    torch.save({"step": torch.tensor(10)}, root / TRAIN_STATE)
    section = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **{name: getattr(config, name) for name in ("num_layers", "hidden_size", "vocab_size")},
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_position_embeddings,
        "normalization": "RMSNorm",
        "activation_func": "torch.nn.functional.silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "bf16": True,
    }
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": section}))
    samples.save(samples.byte_level(), folder / "tokenizer", chat_template="{{ messages }}")
    return root


@pytest.mark.parametrize("write", [core_0_19, bridge])
def test_megatron_to_hugging_face_and_back_is_bit_exact(tmp_path: Path, write) -> None:
    source = open_checkpoint(write(tmp_path / "source"))
    export_huggingface(source, tmp_path / "hf")
    export_megatron(open_checkpoint(tmp_path / "hf"), tmp_path / "again")
    again = open_checkpoint(tmp_path / "again")
    assert replace(again.config, eos_token_ids=()) == replace(source.config, eos_token_ids=())
    assert again.dtype == source.dtype
    for name in canonical_shapes(source.config):
        expected = read_canonical(source, name, source.config)
        assert torch.equal(read_canonical(again, name, source.config), expected), name
    # Megatron's own arguments, which training reads, say the same as our record of the model.
    args = vars(load_torch_file(tmp_path / "again" / "release" / "common.pt")["args"])
    del args[OWN_CONFIG]
    assert model_config_from_args(args, "args") == replace(again.config, eos_token_ids=())


def test_a_tokenizer_of_the_iteration_goes_to_hugging_face(tmp_path: Path) -> None:
    source = open_checkpoint(bridge(tmp_path / "source"))
    assert source.config.eos_token_ids == ()
    export_huggingface(source, tmp_path / "hf")
    tokens = tmp_path / "source" / "iter_0000010" / "tokenizer"
    for file in tokens.iterdir():
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()
    assert open_checkpoint(tmp_path / "hf").config.eos_token_ids == (257,)
    given = samples.save(samples.byte_level(), tmp_path / "given")
    export_huggingface(source, tmp_path / "hf2", tokens=given)
    expected = (given / "tokenizer_config.json").read_bytes()
    assert (tmp_path / "hf2" / "tokenizer_config.json").read_bytes() == expected
    assert expected != (tokens / "tokenizer_config.json").read_bytes()


def test_vocabulary_rows_are_padded_for_megatron_and_cut_for_hugging_face(tmp_path: Path) -> None:
    export_megatron(MemorySource(LLAMA, padding=3), tmp_path / "megatron")
    source = open_checkpoint(tmp_path / "megatron")
    assert source.shapes()["output_layer.weight"] == (128, 20)
    export_huggingface(source, tmp_path / "hf")
    assert load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"].shape == (37, 20)


def test_tokenizer_files_travel_along(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    export_huggingface(MemorySource(LLAMA), hf)
    (hf / "tokenizer.json").write_text("{}")
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    (tmp_path / "merges.txt").write_text("of something else")
    export_megatron(open_checkpoint(hf), tmp_path / "megatron")
    export_huggingface(open_checkpoint(tmp_path / "megatron"), tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"tokenizer.json", "generation_config.json"} <= names
    assert "merges.txt" not in names
    assert open_checkpoint(tmp_path / "again").config.eos_token_ids == (9,)


@pytest.mark.parametrize("export", [export_huggingface, export_megatron])
def test_a_target_with_anything_in_it_is_refused(tmp_path: Path, export) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export(MemorySource(LLAMA), tmp_path)
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export(MemorySource(LLAMA), tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("export", [export_huggingface, export_megatron])
def test_an_interrupted_conversion_is_no_checkpoint(tmp_path: Path, export) -> None:
    source = MemorySource(LLAMA)
    original, target = source.read, tmp_path / "target"

    def fail(name: str) -> torch.Tensor:
        if name == "output_layer.weight":
            raise OSError("disk full")
        return original(name)

    source.read = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk full"):
        export(source, target, file_bytes=3000)
    with pytest.raises(CheckpointError):
        open_checkpoint(target)


def test_an_incomplete_source_makes_no_folder(tmp_path: Path) -> None:
    source = MemorySource(LLAMA)
    del source.weights["output_layer.weight"]
    with pytest.raises(CheckpointError, match=r"output_layer\.weight"):
        export_megatron(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"linear_bias": True},
        {"norm": "layernorm"},
        {"activation": "quick_gelu_gated"},
        {"activation": "squared_relu"},
        {"activation_clamp": 7.0},
        {"glu_linear_offset": 1.0},
        {"qk_l2_norm": True},
        {"no_rope_layers": (1,)},
        {"softmax_scale": 0.1},
        {"rope": RopeConfig(rotary_dim=2)},
        {"rope": RopeConfig(interleaved=True)},
    ],
    ids=str,
)
def test_what_hugging_face_cannot_express_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = MemorySource(replace(LLAMA, **changes))
    ((name, value),) = changes.items()
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value!r}")):
        export_huggingface(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    export_megatron(source, tmp_path / "megatron")
    assert open_checkpoint(tmp_path / "megatron").config == source.config


def test_layers_of_different_dtypes_cannot_be_stacked(tmp_path: Path) -> None:
    source = MemorySource(LLAMA)
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    source.weights[name] = source.weights[name].float()
    with pytest.raises(CheckpointError, match="layers differ"):
        export_megatron(source, tmp_path / "megatron")


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    export_megatron(MemorySource(LLAMA), tmp_path / "a", on_bytes=lambda *x: calls.append(x))
    assert len(calls) == len(canonical_shapes(LLAMA))
    assert calls[-1][0] == calls[-1][1]


def test_files_are_filled_in_order() -> None:
    assert plan_files([("a", 3), ("b", 3), ("c", 5), ("d", 20), ("e", 1)], 8) == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
    ]
    assert plan_files([], 8) == []
