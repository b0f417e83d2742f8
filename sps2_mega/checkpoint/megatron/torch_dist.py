"""Reader of Megatron's distributed checkpoints (`torch_dist`), written at any TP x PP.

It does not need Megatron. Layers are stacked: `decoder.layers.mlp.linear_fc2.weight` is [L, ..],
stored in pieces of one layer and one TP rank; checkpoints with numbered layers are read as well,
and so is `torch_dcp`, the same format without Megatron's own index. Only bytes of pieces that
overlap the wanted part of a layer are read, straight into the parameter where they lie in a row.
Optimizer state, random states and `_extra_state` are never touched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sps2_mega.checkpoint.canonical import WORD_EMBEDDINGS, Shape
from sps2_mega.checkpoint.json_file import read_json
from sps2_mega.checkpoint.megatron.metadata import Metadata, Piece, StoredTensor, read_metadata
from sps2_mega.checkpoint.megatron.names import canonical_name
from sps2_mega.checkpoint.megatron.run import read_run
from sps2_mega.checkpoint.megatron.safe_pickle import load_tensor
from sps2_mega.checkpoint.megatron.stored_tensor import StoredValues, locate
from sps2_mega.checkpoint.sharding import RankPart
from sps2_mega.checkpoint.weight_source import WeightSource
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError

_BACKEND = "torch_dist"
_STACKED = "decoder.layers."


@dataclass(frozen=True, slots=True)
class _Place:
    """Location of a canonical tensor: a whole stored tensor, or one layer of a stacked one."""

    stored: StoredTensor
    layer: int | None

    @property
    def shape(self) -> Shape:
        return self.stored.size if self.layer is None else self.stored.size[1:]


class TorchDistSource(WeightSource):
    """A `WeightSource` over one iteration folder; every canonical name has exactly one place."""

    format = "megatron torch_dist"

    def __init__(
        self, folder: Path, config: ModelConfig | None = None, *, tokens: Path | None = None
    ) -> None:
        self.path = folder
        _check_backend(folder)
        metadata = read_metadata(folder)
        run = read_run(folder, config, tokens, metadata)
        self.config, self.iteration, self.saved_layout = run.config, run.iteration, run.saved_layout
        self.pattern = run.pattern
        self._places = _all_places(metadata)
        first = self._places.get(WORD_EMBEDDINGS) or next(iter(self._places.values()))
        self.dtype = first.stored.dtype

    def shapes(self) -> dict[str, Shape]:
        return {name: place.shape for name, place in self._places.items()}

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        result = torch.empty(place.shape, dtype=getattr(torch, place.stored.dtype))
        _fill(result, place, [range(size) for size in place.shape])
        return result

    def read_into(self, target: Tensor, name: str, part: RankPart | None) -> None:
        place = self._places[name]
        box = [range(size) for size in place.shape]
        if part is None:
            _fill(target, place, box)
            return
        for window, wanted in part.windows(target):
            box[part.dim] = wanted
            _fill(window, place, box)

    def origin(self, name: str) -> str:
        place = self._places.get(name)
        if place is None:
            return "no entry of .metadata"
        return place.stored.name + ("" if place.layer is None else f"[{place.layer}]")


def _check_backend(folder: Path) -> None:
    path = folder / "metadata.json"
    stated = read_json(path) if os.path.lexists(path) else {}
    backend = stated.get("sharded_backend", _BACKEND)
    if backend != _BACKEND:
        raise CheckpointError(
            f"{path}: sharded_backend={backend!r} is not supported (needs {_BACKEND})"
        )


def _all_places(metadata: Metadata) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    for stored in metadata.tensors:
        for name, place in _places(stored):
            if name in found:
                raise CheckpointError(f"{metadata.folder}: {name} occurs twice: {stored.name}")
            found[name] = place
    if not found:
        raise CheckpointError(f"{metadata.folder}: no model weights in .metadata")
    return found


def _places(stored: StoredTensor) -> Iterator[tuple[str, _Place]]:
    name = canonical_name(stored.name)
    assert name is not None  # read_metadata keeps weights only
    first, _, _ = name.removeprefix(_STACKED).partition(".")
    if not name.startswith(_STACKED) or first.isdecimal():
        yield name, _Place(stored, None)
        return
    for layer in range(stored.size[0] if stored.size else 0):
        yield f"{_STACKED}{layer}.{name.removeprefix(_STACKED)}", _Place(stored, layer)


def _fill(target: Tensor, place: _Place, box: list[range]) -> None:
    """Fill `target` with the values of a place inside `box`, one range per dimension.

    Raises:
        CheckpointError: pieces are absent, damaged, or do not cover the box.
    """
    lead = () if place.layer is None else (place.layer,)
    shared: list[tuple[range, ...]] = []
    for piece in place.stored.pieces:
        if lead and not piece.offsets[0] <= lead[0] < piece.offsets[0] + piece.sizes[0]:
            continue
        offsets, sizes = piece.offsets[len(lead) :], piece.sizes[len(lead) :]
        common = tuple(
            range(max(wanted.start, start), min(wanted.stop, start + size))
            for wanted, start, size in zip(box, offsets, sizes, strict=True)
        )
        if all(common):
            shared.append(common)
            window = target[_slices(common, [wanted.start for wanted in box])]
            _copy(window, place, piece, common)
    covered = sum(math.prod(map(len, common)) for common in shared)
    if covered != target.numel() or _overlap(shared):
        layer = "" if place.layer is None else f" of layer {place.layer}"
        raise CheckpointError(
            f"{place.stored.name}: its pieces hold {covered} of {target.numel()} values{layer}"
            + (", some of them twice" if _overlap(shared) else "")
        )


def _copy(target: Tensor, place: _Place, piece: Piece, common: tuple[range, ...]) -> None:
    """Copy the values of a piece inside `common`, in coordinates of the layer, to `target`."""
    where = f"{place.stored.name} at {list(piece.offsets)} in {piece.place.file}"
    layer = 0 if place.layer is None else place.layer - piece.offsets[0]
    sizes, offsets = piece.sizes, piece.offsets
    if place.layer is not None:
        sizes, offsets = sizes[1:], offsets[1:]
    values = locate(piece.place.file, piece.place.start, piece.place.length, where)
    if values is None or not sizes:
        whole = load_tensor(piece.place.read(where), where)
        _check_stored(whole, place, piece, where)
        whole = whole.reshape(-1, *sizes)[layer]
        target.copy_(whole[_slices(common, list(offsets))])
        return
    _check_stored(values, place, piece, where)
    rows = replace(values, shape=(math.prod(piece.sizes) // math.prod(sizes[1:]), *sizes[1:]))
    columns = None
    if len(sizes) > 1 and len(common[1]) != sizes[1]:
        columns = slice(common[1].start - offsets[1], common[1].stop - offsets[1])
    rows.copy_rows(target, layer * sizes[0] + common[0].start - offsets[0], columns)


def _check_stored(values: Tensor | StoredValues, place: _Place, piece: Piece, where: str) -> None:
    if math.prod(values.shape) != math.prod(piece.sizes):
        raise CheckpointError(
            f"{where}: {list(values.shape)} stored, {list(piece.sizes)} announced"
        )
    dtype = str(values.dtype).removeprefix("torch.")
    if dtype != place.stored.dtype:
        raise CheckpointError(f"{where}: {dtype} stored, {place.stored.dtype} announced")


def _slices(box: tuple[range, ...], start: list[int]) -> tuple[slice, ...]:
    return tuple(
        slice(wanted.start - first, wanted.stop - first)
        for wanted, first in zip(box, start, strict=True)
    )


def _overlap(boxes: list[tuple[range, ...]]) -> bool:
    return any(
        all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))
        for number, one in enumerate(boxes)
        for other in boxes[:number]
    )
