"""A `torch_dist` folder with the pieces, files and order of a run at TP x PP, of random bytes."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from sps2_mega.checkpoint.canonical import VOCAB_NAMES, canonical_shapes, split_layer
from sps2_mega.checkpoint.megatron.names import stored_name
from sps2_mega.checkpoint.sharding import padded_vocab_size, rank_part
from sps2_mega.config import ModelConfig

_BLOCK = 1 << 26


class RunWriter:
    """Writer of the pieces of all ranks of a run, one `.distcp` file per rank."""

    def __init__(self, folder: Path, config: ModelConfig, tp: int, pp: int) -> None:
        self._folder, self._config, self._tp, self._pp = folder, config, tp, pp
        self._dtype = getattr(torch, config.dtype)
        generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(_BLOCK, generator=generator).to(self._dtype)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._pieces = 0

    def write(self) -> None:
        self._folder.mkdir(parents=True)
        for stage in range(self._pp):
            for rank in range(self._tp):
                path = self._folder / f"__{stage * self._tp + rank}_0.distcp"
                with path.open("wb") as file:
                    self._write_rank(file, stage, rank)
        metadata = Metadata(
            state_dict_metadata=dict(self._tensors), planner_data=None, storage_data=self._storage
        )
        with (self._folder / ".metadata").open("wb") as file:
            pickle.dump(metadata, file)
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self._folder / "metadata.json").write_text(json.dumps(backend))

    def _write_rank(self, file: io.BufferedWriter, stage: int, rank: int) -> None:
        layers = self._config.num_layers
        for name, shape in canonical_shapes(self._config).items():
            layer, part = split_layer(name)
            first = layer is None and name.startswith("embedding")
            home = 0 if first else self._pp - 1 if layer is None else layer * self._pp // layers
            if home != stage:
                continue
            size, boxes = self._boxes(name, shape, rank)
            for offsets, sizes in boxes:
                if layer is None:
                    self._store(file, name, size, offsets, sizes)
                else:
                    stacked = f"decoder.layers.{stored_name(part)}"
                    box = ((layer, *offsets), (1, *sizes))
                    self._store(file, stacked, (layers, *size), *box)

    def _boxes(
        self, name: str, shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
        """Size of the stored tensor, and the boxes of it that a TP rank writes."""
        if name in VOCAB_NAMES:
            rows = padded_vocab_size(self._config.vocab_size, self._tp)
            share = rows // self._tp
            return (rows, *shape[1:]), [((rank * share, 0), (share, *shape[1:]))]
        part = rank_part(name, self._config, tp_rank=rank, tp=self._tp)
        if part is None:
            return shape, [] if rank else [((0,) * len(shape), shape)]
        boxes = []
        for piece in part.ranges:
            offsets, sizes = [0] * len(shape), list(shape)
            offsets[part.dim], sizes[part.dim] = piece.start, len(piece)
            boxes.append((tuple(offsets), tuple(sizes)))
        return shape, boxes

    def _store(
        self,
        file: io.BufferedWriter,
        stored: str,
        size: tuple[int, ...],
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
    ) -> None:
        entry = self._tensors.setdefault(
            stored, TensorStorageMetadata(TensorProperties(self._dtype), torch.Size(size), [])
        )
        buffer, start = io.BytesIO(), file.tell()
        torch.save(self._values(torch.Size(sizes)), buffer)
        file.write(buffer.getbuffer())
        info = _StorageInfo(Path(file.name).name, start, file.tell() - start)
        self._storage[MetadataIndex(stored, offsets, len(entry.chunks))] = info
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))

    def _values(self, sizes: torch.Size) -> Tensor:
        """Values that differ from piece to piece."""
        self._pieces += 1
        first = self._pieces * 7919 % 4096
        count = sizes.numel()
        copies = -(-(first + count) // _BLOCK)
        return self._block.repeat(copies)[first : first + count].clone().view(sizes)
