"""Damaged Megatron folders: each ends in one line that names file or field, and at once."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from histories.test_damaged_folders import CONTENTS, INF, LIMIT_S, NAN, in_time, load
from torch.distributed.checkpoint.metadata import MetadataIndex
from unit.checkpoint.checkpoints import LLAMA, MemorySource, write_megatron

from sps2_mega.errors import CheckpointError, ConfigError

FC1 = "decoder.layers.mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"
ROWS = 64
__all__ = ["in_time"]  # a fixture that every test here has


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch_dist folder as a training run writes it."""
    root = tmp_path_factory.mktemp("sound") / "megatron"
    args = {"tokenizer_type": "NullTokenizer", "vocab_size": 37, "null_tokenizer_eod_id": 36}
    return write_megatron(root, LLAMA, rows=ROWS, args=args)


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "megatron"))


def refusal(root: Path) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        load(root)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 3000
    return message


def test_the_sound_folder_loads(root: Path) -> None:
    load(root)


# --- .metadata -----------------------------------------------------------------------------------


def index_of(metadata: Any, name: str = FC1) -> Any:
    return next(index for index in metadata.storage_data if index.fqn == name)


def on_chunk(**values: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata[FC1].chunks[1]
        for name, value in values.items():
            object.__setattr__(chunk, name, value)
        storage = metadata.storage_data
        if isinstance(values.get("offsets"), tuple):
            moved = MetadataIndex(FC1, torch.Size((1, 0, 0)))
            storage[MetadataIndex(FC1, values["offsets"])] = storage.pop(moved)

    return edit


def on_tensor(name: str = FC1, **values: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        for field, value in values.items():
            setattr(metadata.state_dict_metadata[name], field, value)

    return edit


def on_place(**values: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        for field, value in values.items():
            setattr(metadata.storage_data[index_of(metadata)], field, value)

    return edit


def announced(dtype: torch.dtype) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        metadata.state_dict_metadata[FC1].properties.dtype = dtype

    return edit


def on_whole(name: str, value: Any) -> Callable[[Any], None]:
    return lambda metadata: setattr(metadata, name, value)


def renamed(old: str, new: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        states = metadata.state_dict_metadata
        states[new] = states.pop(old)

    return edit


def doubled(metadata: Any) -> None:
    """The second piece covers the rows of the first one too."""
    on_chunk(sizes=torch.Size((2, 56, 20)))(metadata)


METADATA: dict[str, Callable[[Any], None]] = {
    "piece outside": on_chunk(offsets=(7, 0, 0)),
    "piece at minus one": on_chunk(offsets=(-1, 0, 0)),
    "piece of a wrong rank": on_chunk(offsets=(1, 0)),
    "piece at no place": on_chunk(offsets=None),
    "piece twice as large": doubled,
    "piece of minus one row": on_chunk(sizes=torch.Size((-1, 56, 20))),
    "piece of sizes of text": on_chunk(sizes=("1", "56", "20")),
    "piece without sizes": on_chunk(sizes=None),
    "piece that is smaller": on_chunk(sizes=torch.Size((1, 55, 20))),
    "piece of nothing": on_chunk(sizes=torch.Size((1, 0, 20))),
    "one piece less": lambda metadata: metadata.state_dict_metadata[FC1].chunks.pop(),
    "one piece twice": lambda metadata: metadata.state_dict_metadata[FC1].chunks.append(
        metadata.state_dict_metadata[FC1].chunks[0]
    ),
    "no pieces": on_tensor(chunks=[]),
    "pieces of None": on_tensor(chunks=None),
    "pieces of texts": on_tensor(chunks=["x"]),
    "size of another rank": on_tensor(size=torch.Size((56, 20))),
    "size of None": on_tensor(size=None),
    "size of texts": on_tensor(size=("3", "56", "20")),
    "size of zero layers": on_tensor(size=torch.Size((0, 56, 20))),
    "size of a billion layers": on_tensor(size=torch.Size((10**9, 56, 20))),
    "size of 2^62 rows": on_tensor(size=torch.Size((3, 2**62, 20))),
    "size of 2^70 rows": on_tensor(size=(3, 2**70, 20)),
    "one row more": on_tensor(size=torch.Size((3, 57, 20))),
    "a vector more": on_tensor(NORM, size=torch.Size((20, 1))),
    "a scalar": on_tensor(NORM, size=torch.Size(())),
    "stored as int8": announced(torch.int8),
    "stored as float32": announced(torch.float32),
    "stored as float16": announced(torch.float16),
    "properties of None": on_tensor(properties=None),
    "place before the file": on_place(offset=-5),
    "place of another record": on_place(offset=0),
    "place beyond the file": on_place(offset=10**12),
    "place at 2^70": on_place(offset=2**70),
    "place at a text": on_place(offset="x"),
    "place at None": on_place(offset=None),
    "place of no bytes": on_place(length=0),
    "place of minus one byte": on_place(length=-1),
    "place of 2^62 bytes": on_place(length=2**62),
    "place of half the bytes": on_place(length=900),
    "place of a float": on_place(length=900.5),
    "file that is absent": on_place(relative_path="__7_7.distcp"),
    "file that is the folder": on_place(relative_path="."),
    "file of no name": on_place(relative_path=""),
    "file of None": on_place(relative_path=None),
    "file of a number": on_place(relative_path=5),
    "file with a zero": on_place(relative_path="a\0b"),
    "file above": on_place(relative_path="../release.distcp"),
    "no places": on_whole("storage_data", None),
    "places in a list": on_whole("storage_data", []),
    "no tensors": on_whole("state_dict_metadata", None),
    "tensors in a list": on_whole("state_dict_metadata", [1]),
    "no tensor at all": on_whole("state_dict_metadata", {}),
    "a number for a name": renamed(FC1, 5),
    "None for a name": renamed(FC1, None),
    "another name": renamed(FC1, "decoder.layers.mlp.linear_fc9.weight"),
    "a layer of 5000 digits": renamed(FC1, f"decoder.layers.{'9' * 5000}.mlp.linear_fc1.weight"),
    "a layer beyond": renamed(FC1, "decoder.layers.7.mlp.linear_fc1.weight"),
    "one tensor less": lambda metadata: metadata.state_dict_metadata.pop(NORM),
}


@pytest.mark.parametrize("kind", METADATA)
def test_a_damaged_index_is_named(root: Path, kind: str) -> None:
    path = root / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    METADATA[kind](metadata)
    path.write_bytes(pickle.dumps(metadata))
    refusal(root)


# --- files of any content ------------------------------------------------------------------------

FILES = (".metadata", "common.pt", "metadata.json", "__0_0.distcp", "run_config.yaml")


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(root: Path, name: str, kind: str) -> None:
    folder = root / "release"
    if name == "run_config.yaml":
        (folder / "common.pt").unlink()
    (folder / name).unlink(missing_ok=True)
    CONTENTS[kind](folder / name)
    assert str(root) in refusal(root)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_flipped_bytes_end_in_one_line_or_load(root: Path, name: str) -> None:
    """No sum protects the values, so some flips go unseen; none is a traceback or a wait."""
    path = root / "release" / name
    whole = path.read_bytes()
    for seed in range(40):
        chance = random.Random(seed)
        changed = bytearray(whole)
        for _ in range(chance.choice((1, 3, 30))):
            changed[chance.randrange(min(len(changed), 900))] = chance.randrange(256)
        path.write_bytes(changed[: chance.choice((len(changed), len(changed) // 2))])
        began = time.monotonic()
        try:
            load(root)
        except (ConfigError, CheckpointError) as error:
            assert "\n" not in str(error)
        assert time.monotonic() - began < LIMIT_S


# --- what a run states ---------------------------------------------------------------------------


class Odd:
    pass


def on_args(**values: Any) -> Callable[[Any], Any]:
    def edit(state: Any) -> Any:
        vars(state["args"]).update(values)
        return state

    return edit


DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
STATES: dict[str, Callable[[Any], Any]] = {
    "list": lambda state: [state],
    "None": lambda state: None,
    "text": lambda state: "args",
    "tensor": lambda state: torch.zeros(3),
    "empty": lambda state: {},
    "args None": lambda state: state | {"args": None},
    "args list": lambda state: state | {"args": [1]},
    "args text": lambda state: state | {"args": "x"},
    "args number": lambda state: state | {"args": 5},
    "args dict": lambda state: state | {"args": vars(state["args"])},
    "args empty": lambda state: state | {"args": Namespace()},
    "args odd": lambda state: state | {"args": Odd()},
    "layers text": on_args(num_layers="3"),
    "layers none": on_args(num_layers=None),
    "layers a million": on_args(num_layers=10**6),
    "layers 2^70": on_args(num_layers=2**70),
    "layers negative": on_args(num_layers=-3),
    "layers float": on_args(num_layers=3.0),
    "layers tensor": on_args(num_layers=torch.tensor([3, 3])),
    "hidden 2^70": on_args(hidden_size=2**70),
    "hidden list": on_args(hidden_size=[20]),
    "heads zero": on_args(num_attention_heads=0),
    "heads bool": on_args(num_attention_heads=True),
    "eps nan": on_args(norm_epsilon=NAN),
    "eps inf": on_args(norm_epsilon=INF),
    "eps text": on_args(norm_epsilon="x"),
    "eps negative": on_args(norm_epsilon=-1.0),
    "base zero": on_args(rotary_base=0),
    "base text": on_args(rotary_base="x"),
    "positions text": on_args(max_position_embeddings="x"),
    "positions negative": on_args(max_position_embeddings=-1),
    "vocabulary text": on_args(vocab_size="x"),
    "vocabulary 1e12": on_args(vocab_size=10**12),
    "tokenizer list": on_args(tokenizer_type=["NullTokenizer"]),
    "swiglu text": on_args(swiglu="yes"),
    "pattern number": on_args(hybrid_layer_pattern=5),
    "unknown deep": on_args(attention_of_tomorrow=DEEP),
    "unknown long": on_args(attention_of_tomorrow="\n" * 10**6),
    "format list": on_args(ckpt_format=[1]),
    "dtype text": on_args(params_dtype="odd", bf16="x"),
}


@pytest.mark.parametrize("where", ["common.pt", "common_state"])
@pytest.mark.parametrize("kind", STATES)
def test_wrong_facts_of_a_run_are_named(root: Path, kind: str, where: str) -> None:
    folder = root / "release"
    state = torch.load(folder / "common.pt", weights_only=False)
    state = STATES[kind](state)
    if where == "common.pt":
        torch.save(state, folder / "common.pt")
    else:
        (folder / "common.pt").unlink()
        torch.save([state], folder / "__9_0.distcp")
        path = folder / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        info = type(next(iter(metadata.storage_data.values())))
        length = (folder / "__9_0.distcp").stat().st_size
        place = MetadataIndex("common_state/shard_0_1")
        metadata.storage_data[place] = info("__9_0.distcp", 0, length)
        path.write_bytes(pickle.dumps(metadata))
    refusal(root)


BRIDGE: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 20, "ffn_hidden_size": 28, "num_attention_heads": 6,
    "num_query_groups": 2, "kv_channels": 4, "vocab_size": 37, "seq_length": 64,
    "normalization": "RMSNorm", "layernorm_epsilon": 1e-5, "gated_linear_unit": True,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "add_bias_linear": False, "position_embedding_type": "rope", "rotary_base": 10000,
    "share_embeddings_and_output_weights": False, "bf16": True,
}  # fmt: skip
BOMB = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))]
)
YAML: dict[str, str] = {
    "deep": "model: " + "[" * 10_000,
    "deep mapping": "model: " + "{a: " * 10_000,
    "deep by lines": "\n".join(" " * i + "a:" for i in range(2000)),
    "bomb beside": BOMB + "\nmodel: *a39",
    "bomb inside": BOMB + "\nmodel: {num_layers: *a39}",
    "bomb of unknown": BOMB + "\nmodel: " + json.dumps(BRIDGE)[:-1] + ", tomorrow: *a39}",
    "itself": "model: &m\n  num_layers: *m",
    "two documents": "model: {}\n---\nmodel: {}",
    "code": "model: !!python/object/apply:os.getpid []",
    "control": "model: \x01",
    "number": "5",
    "merge of a number": "model: {<<: 5}",
    "date": "model: {num_layers: 2001-99-99}",
    **{
        f"{name} {value!r}"[:40]: json.dumps({"model": BRIDGE | {name: value}})
        for name in ("num_layers", "hidden_size", "layernorm_epsilon", "vocab_size", "rotary_base")
        for value in ("x", [3], {"a": 1}, -1, NAN, 2**70, True)
        if (name, value) != ("rotary_base", 2**70)  # a number like any other
    },
    **{f"model {value!r}": json.dumps({"model": value}) for value in (None, [], "x", 5, {}, [{}])},
}


@pytest.mark.parametrize("kind", YAML)
def test_a_wrong_run_configuration_is_named(root: Path, kind: str) -> None:
    (root / "release" / "common.pt").unlink()
    (root / "release" / "run_config.yaml").write_text(YAML[kind])
    assert "run_config.yaml" in refusal(root)


# --- trackers ------------------------------------------------------------------------------------

TEXTS = ("", "x", "-1", "1.5", "9" * 5000, "\u0663", "1 2", "release/..", "../release", "\0")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text)[:12])
def test_a_wrong_tracker_is_named(root: Path, text: str) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    assert "latest_checkpointed_iteration.txt" in refusal(root)


STEPS: dict[str, Any] = {
    "number": 5,
    "list": [5],
    "None": None,
    "empty": {},
    **{
        f"step {value!r}"[:30]: {"step": value}
        for value in (None, "7", -1, 1.5, True, 2**70, [7], {}, NAN)
    },
    "step two": {"step": torch.tensor([1, 2])},
    "step float": {"step": torch.tensor(1.5)},
    "step negative": {"step": torch.tensor(-1)},
    "step bool": {"step": torch.tensor(True)},
    "step empty": {"step": torch.empty(0)},
    "step meta": {"step": torch.empty((), device="meta")},
    "step complex": {"step": torch.tensor(1j)},
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_wrong_train_state_is_named(root: Path, kind: str) -> None:
    torch.save(STEPS[kind], root / "latest_train_state.pt")
    assert "latest_train_state.pt" in refusal(root)


@pytest.mark.parametrize("kind", sorted(set(CONTENTS) - {"fifo", "folder", "loop", "device"}))
@pytest.mark.parametrize("name", ["latest_checkpointed_iteration.txt", "latest_train_state.pt"])
def test_a_damaged_tracker_is_named(root: Path, name: str, kind: str) -> None:
    (root / name).unlink(missing_ok=True)
    CONTENTS[kind](root / name)
    assert name in refusal(root)


# --- legacy rank files ---------------------------------------------------------------------------


def legacy(root: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """One rank's file with the same run, edited."""
    state = torch.load(root / "release" / "common.pt", weights_only=False)
    weights = MemorySource(LLAMA, padding=ROWS - LLAMA.vocab_size).weights
    state = {"args": state["args"], "checkpoint_version": 3.0, "iteration": 7, "model": weights}
    changed = edit(state)
    folder = root / "release" / "mp_rank_00"
    for entry in (root / "release").iterdir():
        entry.unlink()
    folder.mkdir()
    torch.save(state if changed is None else changed, folder / "model_optim_rng.pt")
    return folder


def on_weight(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Any], None]:
    def edit(state: Any) -> None:
        state["model"][name] = change(state["model"][name])

    return edit


UP = "decoder.layers.1.mlp.linear_fc1.weight"
LEGACY: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list": lambda state: [state],
    "None": lambda state: 5,
    **{
        f"{name} {value!r}"[:40]: lambda state, name=name, value=value: state | {name: value}
        for name in ("model", "checkpoint_version", "args")
        for value in (None, [1], "x", {}, 1.0 if name == "checkpoint_version" else 5)
    },
    "version nan": lambda state: state | {"checkpoint_version": NAN},
    "transposed": on_weight(UP, lambda weight: weight.t()),
    "scalar": on_weight(UP, lambda weight: torch.tensor(1.0)),
    "a row less": on_weight(UP, lambda weight: weight[1:]),
    "int8": on_weight(UP, lambda weight: weight.to(torch.int8)),
    "bool": on_weight(NORM, lambda weight: weight.bool()),
    "complex": on_weight(NORM, lambda weight: weight.to(torch.complex64)),
    "sparse": on_weight(UP, lambda weight: weight.float().to_sparse()),
    "meta": on_weight(UP, lambda weight: weight.to("meta")),
    "list of numbers": on_weight(UP, lambda weight: [1.0]),
    "absent": lambda state: state["model"].pop(UP) is None,
    "a name of a number": lambda state: state["model"].update({5: torch.zeros(1)}),
    "a layer of digits": lambda state: state["model"].update(
        {f"decoder.layers.{'9' * 5000}.mlp.linear_fc1.weight": torch.zeros(1)}
    ),
    "a layer of 10^9": lambda state: state["model"].update(
        {f"decoder.layers.{10**9}.mlp.linear_fc1.weight": torch.zeros(1)}
    ),
    "layers a million": lambda state: vars(state["args"]).update(num_layers=10**6),
    "two stages": lambda state: vars(state["args"]).update(pipeline_model_parallel_size=2),
}


def test_the_sound_rank_file_loads(root: Path) -> None:
    legacy(root, lambda state: None)
    load(root)


@pytest.mark.parametrize("kind", LEGACY)
def test_a_wrong_rank_file_is_named(root: Path, kind: str) -> None:
    legacy(root, LEGACY[kind])
    refusal(root)


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_damaged_rank_file_is_named(root: Path, kind: str) -> None:
    path = legacy(root, lambda state: None) / "model_optim_rng.pt"
    path.unlink()
    CONTENTS[kind](path)
    assert "mp_rank_00" in refusal(root)


@pytest.mark.parametrize("name", ["mp_rank_x", "mp_rank_99", "mp_rank_00_999", "mp_rank_000"])
def test_wrong_rank_folders_are_named(root: Path, name: str) -> None:
    os.mkdir(legacy(root, lambda state: None).parent / name)
    assert "mp_rank" in refusal(root)
