"""Index of a checkpoint in the format of torch.distributed.checkpoint: its file `.metadata`.

It gives for every tensor the global size and, for every stored piece, its offset in the tensor and
the place of its bytes in a `.distcp` file; for every other object, the place of its bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sps2_mega.checkpoint.canonical import Shape
from sps2_mega.checkpoint.megatron.names import canonical_name
from sps2_mega.checkpoint.megatron.safe_pickle import Record, load_torch_bytes, read_records
from sps2_mega.errors import CheckpointError

STORED_DTYPES = ("float32", "bfloat16", "float16", "float64")
_MOST_LAYERS = 10_000
_LONGEST_NAME = 500


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [start, start + length) of a file."""

    file: Path
    start: int
    length: int

    def read(self, where: str) -> bytes:
        """Read all of the bytes.

        Raises:
            CheckpointError: the file is absent or too short; begins with `where`.
        """
        try:
            with self.file.open("rb") as file:
                short = self.start + self.length - os.fstat(file.fileno()).st_size
                if short > 0:
                    raise CheckpointError(f"{where}: the file ends {short} bytes too early")
                file.seek(self.start)
                return file.read(self.length)
        except OSError as error:
            raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a stored tensor and the place of its bytes."""

    offsets: Shape
    sizes: Shape
    place: Place


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    size: Shape
    dtype: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """Model weights of a folder, and its objects (arguments, iteration) by name."""

    folder: Path
    tensors: tuple[StoredTensor, ...]
    objects: dict[str, Place] = field(default_factory=dict)

    def load(self, name: str) -> Any:
        """Load the object of a name; names that begin with it and a slash are its only shard.

        None if there is no such object.

        Raises:
            CheckpointError: the object would run code, is damaged, or is outside the folder.
        """
        for found, place in self.objects.items():
            if found == name or found.startswith(f"{name}/"):
                value = load_torch_bytes(place.read(found), f"{place.file}: {found}")
                # One entry for each stored shard.
                return value[0] if isinstance(value, list) and len(value) == 1 else value
        return None


def read_metadata(folder: Path) -> Metadata:
    """Read `.metadata`: every tensor that is a model weight, and every object that is no tensor.

    Raises:
        CheckpointError: the file would run code, is damaged, or points outside the folder.
    """
    path = folder / ".metadata"
    metadata = read_records(path)
    try:
        pieces: dict[tuple[str, Shape], Any] = {}
        objects: dict[str, Place] = {}
        files = _Files(folder)
        for index, info in metadata.storage_data.items():
            if getattr(index, "offset", None) is not None:
                pieces[index.fqn, tuple(index.offset)] = info
            elif _is_state(index.fqn):
                objects[index.fqn] = _place(files, index.fqn, info)
        tensors = tuple(
            _join_gate_and_up(
                _stored_tensor(name, record, pieces, files)
                for name, record in metadata.state_dict_metadata.items()
                if hasattr(record, "chunks") and canonical_name(name) is not None
            )
        )
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path}: not the metadata of a checkpoint: {error}") from None
    return Metadata(folder, tensors, objects)


def _is_state(name: Any) -> bool:
    """Whether an object tells of the run; random and optimizer states are never looked at."""
    return isinstance(name, str) and name.partition("/")[0] in ("common_state", "args", "iteration")


def _stored_tensor(
    name: str, record: Record, storage: dict[tuple[str, Shape], Any], files: _Files
) -> StoredTensor:
    folder = files.folder
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a name of {len(name)} characters")
    dtype = str(record.properties.state[0])
    if dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{folder}: {name} is stored as {dtype}, which is not supported "
            f"(known: {', '.join(STORED_DTYPES)})"
        )
    pieces = []
    for chunk in record.chunks:
        offsets = _ints(chunk.offsets, name)
        info = storage.get((name, offsets))
        if info is None:
            raise CheckpointError(f"{folder}: {name} has no stored piece at {offsets}")
        pieces.append(Piece(offsets, _ints(chunk.sizes, name), _place(files, name, info)))
    stored = StoredTensor(name, _ints(record.size, name), dtype, tuple(pieces))
    _check_boxes(stored, folder)
    if stored.size and stored.size[0] > _MOST_LAYERS and name.partition("layers.")[2][:1].isalpha():
        raise CheckpointError(
            f"{folder}: {name} {list(stored.size)} has more than {_MOST_LAYERS} layers"
        )
    return stored


def _ints(values: Any, name: str) -> Shape:
    if not all(isinstance(value, int) for value in values):
        raise TypeError(f"{name}: {tuple(values)} are not integers")
    return tuple(values)


def _check_boxes(stored: StoredTensor, folder: Path) -> None:
    for piece in stored.pieces:
        box = tuple(zip(piece.offsets, piece.sizes, strict=True))
        inside = len(box) == len(stored.size) and all(
            start >= 0 and size >= 0 and start + size <= whole
            for (start, size), whole in zip(box, stored.size, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{folder}: {stored.name} {list(stored.size)} has a piece {list(piece.sizes)} at "
                f"{list(piece.offsets)}, outside of it"
            )


class _Files(dict[str, Path]):
    """Files of a folder by their stored names, each checked once."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        file = self.folder / name
        try:
            inside = "\0" not in name and file.resolve().parent == self.folder.resolve()
            regular = not inside or file.is_file() or not file.exists()
        except (OSError, RuntimeError) as error:  # links that lead to themselves
            raise CheckpointError(f"{file}: {error}") from None
        if not inside:
            raise CheckpointError(f"{self.folder}: a piece is in {name!r}, outside the folder")
        if not regular:
            raise CheckpointError(f"{file} is not a regular file")
        self[name] = file
        return file


def _place(files: _Files, name: str, info: Any) -> Place:
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(
            f"{files.folder}: {name} is stored compressed, which is not supported"
        )
    start, length = _ints((info.offset, info.length), name)
    if start < 0 or length < 0:
        raise ValueError(f"{name}: {length} bytes at {start}")
    return Place(files[info.relative_path], start, length)


def _join_gate_and_up(stored: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
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
    yield from tensors.values()


def _moved(piece: Piece, axis: int, rows: int) -> Shape:
    offsets = piece.offsets
    return (*offsets[:axis], offsets[axis] + rows, *offsets[axis + 1 :])
