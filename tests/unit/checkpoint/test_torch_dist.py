"""Damaged and odd torch_dist folders; mapping of Megatron's names to canonical ones."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import MetadataIndex
from unit.checkpoint.checkpoints import CONFIGS, LLAMA, MemorySource

from sps2_mega.checkpoint.export import export_megatron
from sps2_mega.checkpoint.inventory import check_complete
from sps2_mega.checkpoint.megatron.names import canonical_name, stored_name
from sps2_mega.checkpoint.source import open_checkpoint
from sps2_mega.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    export_megatron(MemorySource(LLAMA), tmp_path / "megatron")
    return tmp_path / "megatron"


def edit_metadata(root: Path, edit: Any) -> None:
    path = root / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_torchs_own_reader_agrees(root: Path) -> None:
    wanted = {FC1: torch.empty(3, 56, 20, dtype=torch.bfloat16)}
    load(wanted, storage_reader=FileSystemReader(root / "release"), no_dist=True)
    weights = MemorySource(LLAMA).weights
    expected = [weights[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in range(3)]
    assert torch.equal(wanted[FC1], torch.stack(expected))


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_in_other_shapes_are_put_together(tmp_path: Path, name: str) -> None:
    """Whole stacked tensors in one piece, as torch itself would save them."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    config = CONFIGS[name]
    source = MemorySource(config)
    stacked: dict[str, list[torch.Tensor]] = {}
    for key, tensor in source.weights.items():
        parts = key.split(".")
        if parts[1] == "layers":
            part = stored_name(".".join(parts[3:]))
            stacked.setdefault(f"decoder.layers.{part}", []).append(tensor)
    state = {key: torch.stack(values) for key, values in stacked.items()}
    state |= {key: t for key, t in source.weights.items() if ".layers." not in key}
    save(
        {f"model.module.{key}": value for key, value in state.items()},
        storage_writer=FileSystemWriter(tmp_path),
        no_dist=True,
    )
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(ConfigError, match="architecture is unknown"):
        open_checkpoint(tmp_path)
    opened = open_checkpoint(tmp_path, config)
    check_complete(opened, config)
    assert all(torch.equal(opened.read(key), tensor) for key, tensor in source.weights.items())


def test_a_piece_that_is_not_there_is_named(root: Path) -> None:
    edit_metadata(root, lambda m: m.storage_data.pop(MetadataIndex(FC1, (1, 0, 0))))
    with pytest.raises(
        CheckpointError, match=r"linear_fc1.weight has no stored piece at \(1, 0, 0\)"
    ):
        open_checkpoint(root)


def test_pieces_that_do_not_cover_a_layer_are_an_error(root: Path) -> None:
    edit_metadata(root, lambda m: m.state_dict_metadata[FC1].chunks.pop(2))
    source = open_checkpoint(root)
    assert source.read("decoder.layers.1.mlp.linear_fc1.weight").shape == (56, 20)
    with pytest.raises(CheckpointError, match="0 of 1120 values of layer 2"):
        source.read("decoder.layers.2.mlp.linear_fc1.weight")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "sub/x.distcp"])
def test_pieces_outside_the_folder_are_refused(root: Path, path: str) -> None:
    def edit(metadata: Any) -> None:
        metadata.storage_data[MetadataIndex(FC1, (0, 0, 0))].relative_path = path

    edit_metadata(root, edit)
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(root)


def test_a_short_file_is_an_error(root: Path) -> None:
    file = root / "release" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="100 bytes too early"):
        open_checkpoint(root).read("output_layer.weight")


def test_another_backend_is_named(root: Path) -> None:
    (root / "release" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="sharded_backend='zarr'"):
        open_checkpoint(root)


def test_compressed_pieces_are_refused(root: Path) -> None:
    def edit(metadata: Any) -> None:
        metadata.storage_data[MetadataIndex(FC1, (0, 0, 0))].transform_descriptors = ["zstd"]

    edit_metadata(root, edit)
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(root)


@pytest.mark.parametrize("content", [{}, [1], None, {"state_dict_metadata": 3}])
def test_a_pickle_of_something_else_is_refused(root: Path, content: Any) -> None:
    (root / "release" / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="not the metadata"):
        open_checkpoint(root)


@pytest.mark.parametrize("text", ["", "latest", "-1", "../../x"])
def test_a_bad_tracker_is_refused(root: Path, text: str) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match="must hold a number or 'release'"):
        open_checkpoint(root)


def test_a_tracker_may_point_to_an_iteration(root: Path) -> None:
    shutil.move(root / "release", root / "iter_0000300")
    (root / "latest_checkpointed_iteration.txt").write_text("300\n")
    assert open_checkpoint(root).path.name == "iter_0000300"
    (root / "latest_checkpointed_iteration.txt").write_text("301")
    with pytest.raises(CheckpointError, match="iter_0000301, which is not in"):
        open_checkpoint(root)


def test_an_unknown_folder_lists_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"expected config\.json .*found notes\.txt"):
        open_checkpoint(tmp_path)


def test_the_architecture_comes_from_a_bridge_run_configuration(root: Path) -> None:
    (root / "release" / "common.pt").unlink()
    model = {
        "num_layers": 3,
        "hidden_size": 20,
        "ffn_hidden_size": 28,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 4,
        "vocab_size": 37,
        "seq_length": 64,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "share_embeddings_and_output_weights": False,
        "bf16": True,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
    }
    (root / "release" / "run_config.yaml").write_text(json.dumps({"model": model}))
    source = open_checkpoint(root)
    assert (source.config, source.saved_layout) == (LLAMA, (2, 1))
    model["activation_func"] = "torch.nn.functional.sigmoid"
    (root / "release" / "run_config.yaml").write_text(json.dumps({"model": model}))
    with pytest.raises(ConfigError, match=r"activation_func='torch\.nn\.functional\.sigmoid'"):
        open_checkpoint(root)
    (root / "release" / "run_config.yaml").write_text("model: !!python/object/apply:os.getpid []")
    with pytest.raises(ConfigError, match=r"run_config\.yaml"):
        open_checkpoint(root)


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("output_layer.weight", "output_layer.weight"),
        ("module.module.output_layer.weight", "output_layer.weight"),
        ("model.module.decoder.final_layernorm.bias", "decoder.final_layernorm.bias"),
        (
            "model0.decoder.layers.3.mlp.linear_fc1.layer_norm_bias",
            "decoder.layers.3.pre_mlp_layernorm.bias",
        ),
        (
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.input_layernorm.weight",
        ),
        (
            "decoder.layers.self_attention.linear_qkv.bias",
            "decoder.layers.self_attention.linear_qkv.bias",
        ),
        ("optimizer.state.exp_avg.output_layer.weight", None),
        ("chained_0.optimizer.state.fp32_param.output_layer.weight", None),
        ("decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4", None),
        ("output_layer._extra_state", None),
        ("rng_state/shard_0.0_1.1", None),
    ],
)
def test_names(stored: str, canonical: str | None) -> None:
    assert canonical_name(stored) == canonical


def common_state(root: Path, state: Any, cut: int = 0) -> None:
    """Keep `state` as core 0.19 does: a sharded object in a .distcp file, and no common.pt."""
    folder = root / "release"
    (folder / "common.pt").unlink()
    torch.save([state], folder / "__9_0.distcp")
    length = (folder / "__9_0.distcp").stat().st_size

    def edit(metadata: Any) -> None:
        info = type(next(iter(metadata.storage_data.values())))
        index = MetadataIndex("common_state/shard_0_1")
        metadata.storage_data[index] = info("__9_0.distcp", 0, length + cut)

    edit_metadata(root, edit)


def test_common_state_gives_what_common_pt_gives(root: Path) -> None:
    state = torch.load(root / "release" / "common.pt", weights_only=False)
    expected = open_checkpoint(root)
    common_state(root, state)
    source = open_checkpoint(root)
    assert (source.config, source.saved_layout) == (expected.config, expected.saved_layout)


class Attack:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize(
    ("state", "cut", "message"),
    [
        ({"args": Attack()}, 0, "blocked builtins.exec"),
        ("text", 0, "must hold a dict, found str"),
        ({}, 5, "the file ends 5 bytes too early"),
    ],
)
def test_damaged_common_state_is_refused(root: Path, state: Any, cut: int, message: str) -> None:
    common_state(root, state, cut)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(root)


def test_a_gate_without_its_up_rows_is_refused(root: Path) -> None:
    """Megatron's `singleton_local_shards` keeps both, as `weight_w` and `weight_v`."""

    def edit(metadata: Any) -> None:
        states, storage = metadata.state_dict_metadata, metadata.storage_data
        states[f"{FC1}_w"] = states.pop(FC1)
        for index in [index for index in storage if index.fqn == FC1]:
            storage[MetadataIndex(f"{FC1}_w", index.offset)] = storage.pop(index)

    edit_metadata(root, edit)
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight_w: needs a .*weight_v of its"):
        open_checkpoint(root)
