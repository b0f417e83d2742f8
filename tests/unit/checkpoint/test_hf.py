"""Hugging Face folders: reading of what transformers saved, and one error for all mismatches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from unit.checkpoint.checkpoints import CONFIGS, GPT2, LLAMA, MemorySource, write_hf

from sps2_mega.checkpoint.canonical import canonical_shapes
from sps2_mega.checkpoint.export import export_huggingface
from sps2_mega.checkpoint.huggingface.source import HuggingFaceSource
from sps2_mega.checkpoint.inventory import check_complete
from sps2_mega.checkpoint.source import open_checkpoint
from sps2_mega.errors import CheckpointError

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    export_huggingface(MemorySource(LLAMA), folder)
    return folder


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of a folder's only file."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
    )


def test_query_key_and_value_are_joined_per_query_group(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    q, k, v = (tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    heads = LLAMA.head_dim
    expected = []
    for group in range(2):  # three query heads, one key, one value each
        expected.append(q[group * 3 * heads : (group + 1) * 3 * heads])
        expected += [x[group * heads : (group + 1) * heads] for x in (k, v)]
    assert torch.equal(open_checkpoint(llama).read(QKV), torch.cat(expected))


def test_gpt2_stores_inputs_by_outputs(tmp_path: Path) -> None:
    export_huggingface(MemorySource(GPT2), tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (24, 72)
    source = open_checkpoint(tmp_path / "gpt2")
    fc1 = tensors["transformer.h.1.mlp.c_fc.weight"]
    assert torch.equal(source.read("decoder.layers.1.mlp.linear_fc1.weight"), fc1.t())
    q, k, v = tensors["transformer.h.0.attn.c_attn.bias"].reshape(3, 4, 6)
    expected = torch.stack((q, k, v), 1).reshape(-1)
    assert torch.equal(source.read("decoder.layers.0.self_attention.linear_qkv.bias"), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_without_prefix_are_read(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    export_huggingface(MemorySource(config), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    bare = {n.removeprefix("model.").removeprefix("transformer."): t for n, t in tensors.items()}
    base = open_checkpoint(write_hf(tmp_path / "b", config, bare))
    full = open_checkpoint(tmp_path / "a")
    assert base.shapes() == full.shapes() == canonical_shapes(config)
    assert all(torch.equal(base.read(n), full.read(n)) for n in canonical_shapes(config))


def test_buffers_of_old_transformers_are_ignored(llama: Path, tmp_path: Path) -> None:
    change(llama, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    check_complete(open_checkpoint(llama), LLAMA)
    folder = tmp_path / "gpt2"
    export_huggingface(MemorySource(GPT2), folder)
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.ones(1)}
    change(folder, **{f"transformer.{name}": value for name, value in buffers.items()})
    check_complete(open_checkpoint(folder), GPT2)


def test_a_tied_output_layer_may_be_absent_or_equal(tmp_path: Path) -> None:
    config = replace(LLAMA, tie_embeddings=True)
    folder = tmp_path / "tied"
    export_huggingface(MemorySource(config), folder)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": embeddings.clone()})
    source = open_checkpoint(folder)
    check_complete(source, config)
    assert torch.equal(source.read("embedding.word_embeddings.weight"), embeddings)
    change(folder, **{"lm_head.weight": embeddings + 1})
    with pytest.raises(CheckpointError, match=r"ties .* lm_head\.weight differs"):
        open_checkpoint(folder).read("embedding.word_embeddings.weight")


def test_everything_that_does_not_fit_is_in_one_error(llama: Path) -> None:
    change(
        llama,
        **{
            "model.norm.weight": None,
            "model.layers.0.self_attn.k_proj.weight": None,
            "model.layers.2.mlp.down_proj.weight": torch.zeros(20, 29),
            "model.layers.9.stray": torch.zeros(1),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        check_complete(open_checkpoint(llama), LLAMA)
    message = str(caught.value)
    assert "missing (2)" in message
    assert "decoder.final_layernorm.weight (from model.norm.weight [20])" in message
    assert "model.layers.0.self_attn.k_proj.weight [8, 20]" in message
    assert "model.layers.9.stray [1]" in message
    assert "decoder.layers.2.mlp.linear_fc2.weight: expected [20, 28], found [20, 29]" in message


def test_parts_that_only_add_up_to_the_right_size_are_refused(llama: Path) -> None:
    q, k = torch.zeros(20, 20), torch.zeros(12, 20)  # 24 + 8 are needed
    change(
        llama,
        **{
            "model.layers.1.self_attn.q_proj.weight": q,
            "model.layers.1.self_attn.k_proj.weight": k,
        },
    )
    with pytest.raises(CheckpointError, match=r"q_proj\.weight \[24, 20\]"):
        check_complete(open_checkpoint(llama), LLAMA)


def test_a_wrong_configuration_fails_before_data_is_read(llama: Path) -> None:
    wrong = replace(LLAMA, num_layers=4, vocab_size=38)
    with pytest.raises(CheckpointError) as caught:
        check_complete(open_checkpoint(llama, wrong), wrong)
    assert "decoder.layers.3.mlp.linear_fc1.weight" in str(caught.value)
    assert "expected [38, 20], found [37, 20]" in str(caught.value)


def test_several_files_are_read_through_their_index(tmp_path: Path) -> None:
    source = MemorySource(LLAMA)
    export_huggingface(source, tmp_path / "one")
    export_huggingface(source, tmp_path / "many", file_bytes=2000)
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    many, one = open_checkpoint(tmp_path / "many"), open_checkpoint(tmp_path / "one")
    assert all(torch.equal(many.read(name), one.read(name)) for name in canonical_shapes(LLAMA))
    files[0].unlink()
    with pytest.raises(CheckpointError, match=files[0].name):
        open_checkpoint(tmp_path / "many")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_cannot_point_outside_its_folder(llama: Path, name: str) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(llama)


def test_unreadable_folders_say_why(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    (llama / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable"):
        open_checkpoint(llama)
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="save the model as safetensors"):
        open_checkpoint(llama)
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        open_checkpoint(llama)


def test_the_stored_dtype_is_the_files(llama: Path) -> None:
    assert HuggingFaceSource(llama, replace(LLAMA, dtype="float32")).dtype == "bfloat16"


TRANSFORMERS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "head_dim": 6}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 4}),
    "qwen3": (
        "Qwen3Config",
        {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("family", [*TRANSFORMERS, "gpt2"])
def test_transformers_folders_come_back_as_transformers_saved_them(
    tmp_path: Path, family: str
) -> None:
    transformers = pytest.importorskip("transformers")
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61,
            n_embd=24,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=1,
        )
    else:
        cls, options = TRANSFORMERS[family]
        config = getattr(transformers, cls)(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            **options,
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    source = open_checkpoint(tmp_path / "saved")
    check_complete(source, source.config)
    assert source.config.family == family
    export_huggingface(source, tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    state = again.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    tokens = torch.arange(20)[None] * 3 % 61  # longer than the window
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)
