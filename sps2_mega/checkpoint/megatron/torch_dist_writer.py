"""Writer of `torch_dist` checkpoints for megatron-core, with one tensor in memory at a time.

torch's own `save` needs the whole state dict at once; the format itself does not: a `.distcp` file
is the concatenation of stored tensors, and `.metadata` maps pieces to bytes. Layers become pieces
of one stacked tensor, as Megatron writes them. Single process, no process group.
"""

from __future__ import annotations

import io
import json
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

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

from sps2_mega.checkpoint.canonical import split_layer
from sps2_mega.checkpoint.megatron.names import stored_name
from sps2_mega.errors import CheckpointError

FILE_BYTES = 4 << 30
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistWriter:
    """Writer of one folder; `finish` makes it a checkpoint, `close` ends it early.

    Every added tensor is in a `.distcp` file.
    """

    def __init__(self, folder: Path, num_layers: int, *, file_bytes: int = FILE_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._num_layers = num_layers
        self._file_bytes = file_bytes
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._file = self._next_file()

    def add(self, name: str, tensor: Tensor) -> None:
        """Store a canonical tensor (vocabulary rows padded by the caller, if wanted)."""
        layer, part = split_layer(name)
        if layer is None:
            self._store(name, tensor.contiguous(), tuple(tensor.shape), (0,) * tensor.dim())
            return
        size = (self._num_layers, *tensor.shape)
        offset = (layer, *(0,) * tensor.dim())
        self._store(f"decoder.layers.{stored_name(part)}", tensor[None].contiguous(), size, offset)

    def finish(self, args: Namespace) -> None:
        """Write `.metadata`, common.pt and, last, metadata.json, by which readers know a format."""
        self.close()
        metadata = Metadata(
            state_dict_metadata=dict(self._tensors), planner_data=None, storage_data=self._storage
        )
        with (self._folder / ".metadata").open("wb") as file:
            pickle.dump(metadata, file)
        common: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
        torch.save(common, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(_BACKENDS), encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def _store(
        self, stored: str, values: Tensor, size: tuple[int, ...], offset: tuple[int, ...]
    ) -> None:
        entry = self._tensors.setdefault(
            stored, TensorStorageMetadata(TensorProperties(values.dtype), torch.Size(size), [])
        )
        if (entry.properties.dtype, entry.size) != (values.dtype, torch.Size(size)):
            raise CheckpointError(
                f"{stored}: layers differ: {entry.properties.dtype} {list(entry.size)} and "
                f"{values.dtype} "
                f"{list(size)}; Megatron stacks them in one tensor"
            )
        if self._file.tell() >= self._file_bytes:
            self._file.close()
            self._file = self._next_file()
        start = self._file.tell()
        if values.untyped_storage().nbytes() != values.nbytes:
            values = values.clone()  # torch.save stores the whole storage that a view belongs to
        buffer = io.BytesIO()  # zip offsets within the record must count from its own start
        torch.save(values, buffer)
        self._file.write(buffer.getbuffer())
        info = _StorageInfo(Path(self._file.name).name, start, self._file.tell() - start)
        self._storage[MetadataIndex(stored, offset, len(entry.chunks))] = info
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), values.shape))

    def _next_file(self) -> io.BufferedWriter:
        self._files += 1
        return (self._folder / f"__0_{self._files - 1}.distcp").open("wb")
