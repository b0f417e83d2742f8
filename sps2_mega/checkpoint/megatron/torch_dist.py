"""Reader of Megatron's distributed checkpoints (`torch_dist`), written at any TP x PP.

It does not need Megatron. `.metadata` gives for every tensor its global size and, for every stored
piece, its offset in the tensor and its bytes in a `.distcp` file. Layers are stacked:
`decoder.layers.mlp.linear_fc2.weight` is [L, ..], stored in pieces of one layer and one TP rank;
checkpoints with numbered layers are read as well. `read` loads only the pieces that overlap the
wanted layer. Optimizer state, random states and `_extra_state` are never touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sps2_mega.checkpoint.canonical import WORD_EMBEDDINGS, Shape
from sps2_mega.checkpoint.json_file import read_json
from sps2_mega.checkpoint.megatron.names import canonical_name
from sps2_mega.checkpoint.megatron.run import read_run
from sps2_mega.checkpoint.megatron.safe_pickle import (
    Record,
    load_tensor,
    load_torch_bytes,
    read_records,
)
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError

_BACKEND = "torch_dist"
_STACKED = "decoder.layers."
_COMMON_STATE = "common_state/"  # as saved: common_state/shard_0_1


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a stored tensor and the location of its bytes."""

    offsets: Shape
    sizes: Shape
    file: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    size: Shape
    dtype: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Location of a canonical tensor: a whole stored tensor, or one layer of a stacked one."""

    stored: StoredTensor
    layer: int | None


class TorchDistSource:
    """A `WeightSource` over one iteration folder; every canonical name has exactly one place."""

    format = "megatron torch_dist"

    def __init__(
        self, folder: Path, config: ModelConfig | None = None, *, tokens: Path | None = None
    ) -> None:
        self.path = folder
        _check_backend(folder)
        run = read_run(folder, config, tokens, read_common_state(folder))
        self.config, self.iteration, self.saved_layout = run.config, run.iteration, run.saved_layout
        self._places: dict[str, _Place] = {}
        for stored in read_index(folder):
            for name, place in _places(stored):
                if name in self._places:
                    raise CheckpointError(f"{folder}: {name} occurs twice: {stored.name}")
                self._places[name] = place
        if not self._places:
            raise CheckpointError(f"{folder}: no model weights in .metadata")
        first = self._places.get(WORD_EMBEDDINGS) or next(iter(self._places.values()))
        self.dtype = first.stored.dtype

    def shapes(self) -> dict[str, Shape]:
        return {
            name: place.stored.size if place.layer is None else place.stored.size[1:]
            for name, place in self._places.items()
        }

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        return read_layer(place.stored, place.layer)

    def origin(self, name: str) -> str:
        place = self._places.get(name)
        if place is None:
            return "no entry of .metadata"
        return place.stored.name + ("" if place.layer is None else f"[{place.layer}]")


def read_index(folder: Path) -> list[StoredTensor]:
    """Every tensor in `.metadata` that is a model weight.

    Raises:
        CheckpointError: the file would run code, is damaged, or points outside the folder.
    """
    path = folder / ".metadata"
    metadata = read_records(path)
    try:
        storage = {
            (index.fqn, tuple(index.offset)): info
            for index, info in metadata.storage_data.items()
            if getattr(index, "offset", None) is not None
        }
        return _join_gate_and_up(
            _stored_tensor(name, record, storage, folder)
            for name, record in metadata.state_dict_metadata.items()
            if hasattr(record, "chunks") and canonical_name(name) is not None
        )
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: not the metadata of a checkpoint: {error}") from None


def read_common_state(folder: Path) -> dict[str, Any]:
    """Arguments and iteration, which core 0.19 keeps as a sharded object and not in common.pt.

    Empty if the folder has common.pt or no such object.

    Raises:
        CheckpointError: the object would run code, is damaged, or is outside the folder.
    """
    if (folder / "common.pt").is_file():
        return {}
    path = folder / ".metadata"
    storage = getattr(read_records(path), "storage_data", None)
    if not isinstance(storage, dict):
        raise CheckpointError(f"{path}: not the metadata of a checkpoint: no storage_data")
    for index, info in storage.items():
        name = getattr(index, "fqn", None)
        if not isinstance(name, str) or not name.startswith(_COMMON_STATE):
            continue
        try:
            inside = _file_inside(folder, name, info.relative_path)
            data = _read_bytes(inside, info.offset, info.length, name)
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
        state = load_torch_bytes(data, f"{inside}: {name}")
        if isinstance(state, list) and len(state) == 1:  # one entry for each stored shard
            (state,) = state
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{inside}: {name} must hold a dict, found {type(state).__name__}"
            )
        return state
    return {}


def read_layer(stored: StoredTensor, layer: int | None) -> Tensor:
    """Read the whole tensor, or `[layer]` of a stacked one, holding at most one extra piece.

    Raises:
        CheckpointError: pieces are absent, damaged, or do not cover the tensor.
    """
    lead = () if layer is None else (layer,)
    result = torch.empty(stored.size[len(lead) :], dtype=getattr(torch, stored.dtype))
    covered = 0
    for piece in stored.pieces:
        if lead and not piece.offsets[0] <= lead[0] < piece.offsets[0] + piece.sizes[0]:
            continue
        values = _read_piece(stored, piece)
        if lead:
            values = values[lead[0] - piece.offsets[0]]
        box = list(zip(piece.offsets, piece.sizes, strict=True))[len(lead) :]
        result[tuple(slice(start, start + size) for start, size in box)] = values
        covered += values.numel()
    if covered != result.numel():
        raise CheckpointError(
            f"{stored.name}: its pieces hold {covered} of {result.numel()} values"
            + ("" if layer is None else f" of layer {layer}")
        )
    return result


def _check_backend(folder: Path) -> None:
    path = folder / "metadata.json"
    backend = read_json(path).get("sharded_backend", _BACKEND) if path.is_file() else _BACKEND
    if backend != _BACKEND:
        raise CheckpointError(
            f"{path}: sharded_backend={backend!r} is not supported (needs {_BACKEND})"
        )


def _places(stored: StoredTensor) -> Iterator[tuple[str, _Place]]:
    name = canonical_name(stored.name)
    assert name is not None  # read_index keeps weights only
    first, _, _ = name.removeprefix(_STACKED).partition(".")
    if not name.startswith(_STACKED) or first.isdecimal():
        yield name, _Place(stored, None)
        return
    for layer in range(stored.size[0] if stored.size else 0):
        yield f"{_STACKED}{layer}.{name.removeprefix(_STACKED)}", _Place(stored, layer)


def _stored_tensor(
    name: str, record: Record, storage: dict[tuple[str, Shape], Any], folder: Path
) -> StoredTensor:
    pieces = []
    for chunk in record.chunks:
        info = storage.get((name, tuple(chunk.offsets)))
        if info is None:
            raise CheckpointError(f"{folder}: {name} has no stored piece at {tuple(chunk.offsets)}")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{folder}: {name} is stored compressed, which is not supported")
        file = _file_inside(folder, name, info.relative_path)
        pieces.append(
            Piece(tuple(chunk.offsets), tuple(chunk.sizes), file, info.offset, info.length)
        )
    return StoredTensor(name, tuple(record.size), record.properties.state[0], tuple(pieces))


def _join_gate_and_up(stored: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Give `linear_fc1.weight_w` and `_v` the one name `linear_fc1.weight`; also the biases.

    Megatron's `singleton_local_shards` keeps gate and up as two tensors; the joint one has the
    rows of the gate first.
    """
    tensors = {tensor.name: tensor for tensor in stored}
    for kind, dims in (("weight", 2), ("bias", 1)):
        for name in [name for name in tensors if name.endswith(f"mlp.linear_fc1.{kind}_w")]:
            joint = name.removesuffix("_w")
            gate, up = tensors[name], tensors.get(f"{joint}_v")
            same = up is not None and (gate.size, gate.dtype) == (up.size, up.dtype)
            if up is None or not same or len(gate.size) < dims or joint in tensors:
                raise CheckpointError(
                    f"{name}: needs a {joint}_v of its shape and dtype and no {joint} beside it"
                )
            axis = len(gate.size) - dims
            rows = gate.size[axis]
            size = (*gate.size[:axis], 2 * rows, *gate.size[axis + 1 :])
            below = tuple(replace(piece, offsets=_moved(piece, axis, rows)) for piece in up.pieces)
            del tensors[name], tensors[f"{joint}_v"]
            tensors[joint] = StoredTensor(joint, size, gate.dtype, gate.pieces + below)
    return list(tensors.values())


def _moved(piece: Piece, axis: int, rows: int) -> Shape:
    offsets = piece.offsets
    return (*offsets[:axis], offsets[axis] + rows, *offsets[axis + 1 :])


def _file_inside(folder: Path, name: str, relative: str) -> Path:
    file = folder / relative
    if file.resolve().parent != folder.resolve():
        raise CheckpointError(f"{folder}: {name} is in {relative}, outside the folder")
    return file


def _read_bytes(path: Path, start: int, length: int, where: str) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if len(data) != length:
        raise CheckpointError(f"{where}: the file ends {length - len(data)} bytes too early")
    return data


def _read_piece(stored: StoredTensor, piece: Piece) -> Tensor:
    where = f"{stored.name} at {list(piece.offsets)} in {piece.file}"
    data = _read_bytes(piece.file, piece.start, piece.length, where)
    values = load_tensor(data, where)
    if values.numel() != math.prod(piece.sizes):
        raise CheckpointError(
            f"{where}: {list(values.shape)} stored, {list(piece.sizes)} announced"
        )
    return values.reshape(piece.sizes)
