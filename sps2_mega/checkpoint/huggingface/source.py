"""Reader of Hugging Face safetensors folders, sharded or not, one tensor at a time.

Files are memory-mapped: opening reads headers, `read` touches the pages of one canonical tensor.
`layout` maps file tensors to canonical ones. Names may have the usual prefix (`model.`,
`transformer.`) or none, as in saved base models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sps2_mega.checkpoint.canonical import OUTPUT_LAYER, WORD_EMBEDDINGS, Shape
from sps2_mega.checkpoint.huggingface import layout as hf_layout
from sps2_mega.checkpoint.huggingface.config import read_hf_config
from sps2_mega.checkpoint.huggingface.files import refuse_adapter, weight_files
from sps2_mega.checkpoint.weight_source import WeightSource
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LM_HEAD = "lm_head.weight"


class HuggingFaceSource(WeightSource):
    """A `WeightSource` over safetensors files, whose set of tensors is fixed once it is open."""

    format = "huggingface"
    iteration: int | None = None
    saved_layout: tuple[int, int] | None = None

    def __init__(self, folder: Path, config: ModelConfig | None = None) -> None:
        refuse_adapter(folder)
        self.path = folder
        if config is None and not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: safetensors files without a config.json, so the architecture is "
                "unknown: pass it with --config NAME|FILE"
            )
        self.config = config or read_hf_config(folder)
        self._files: dict[str, Any] = {}  # name of a file's tensor without prefix -> open file
        self._names: dict[str, str] = {}  # the same key -> name in the file
        prefix = hf_layout.prefix(self.config)
        paths, index = weight_files(folder)
        for path in paths:
            handle = _open(path)
            names = list(handle.keys())
            if index is not None:
                names = _indexed(names, path, index)
            for name in names:
                if not name.endswith(hf_layout.IGNORED_SUFFIXES):
                    bare = name.removeprefix(prefix)
                    if bare in self._names:
                        raise CheckpointError(f"{folder}: {name} occurs twice")
                    self._files[bare], self._names[bare] = handle, name
        self._tied_head = self.config.tie_embeddings and _LM_HEAD in self._names
        self._recipes = hf_layout.recipes(self.config)
        self.dtype = self._stored_dtype()

    def shapes(self) -> dict[str, Shape]:
        found = {bare: self._shape(bare) for bare in self._names}
        if self._tied_head:
            del found[_LM_HEAD]
        shapes: dict[str, Shape] = {}
        for name, recipe in self._recipes.items():
            if len(recipe.parts) == 1 and recipe.parts[0] in found:
                actual = found.pop(recipe.parts[0])
                transposed = recipe.how in ("transpose", "qkv_columns")
                shapes[name] = actual[::-1] if transposed else actual
            elif all(found.get(part) == shape for part, shape in self._wanted(name)):
                # Parts of a joined tensor must fit one by one: wrong ones
                # can add up to the right total.
                rows = sum(found.pop(part)[0] for part in recipe.parts)
                shapes[name] = (rows, *recipe.shapes[0][1:])
        return shapes | {self._names[bare]: shape for bare, shape in found.items()}

    def read(self, name: str) -> Tensor:
        recipe = self._recipes[name]
        parts = [self._tensor(part) for part in recipe.parts]
        if name == WORD_EMBEDDINGS and self._tied_head:
            self._check_tied(parts[0])
        return hf_layout.join(recipe, parts, self.config)

    def origin(self, name: str) -> str:
        recipe = self._recipes.get(name)
        if recipe is None:
            return name
        prefix = hf_layout.prefix(self.config)
        return " + ".join(
            f"{part if name == OUTPUT_LAYER else prefix + part} {list(shape)}"
            for part, shape in self._wanted(name)
        )

    def _wanted(self, name: str) -> list[tuple[str, Shape]]:
        recipe = self._recipes[name]
        return list(zip(recipe.parts, recipe.shapes, strict=True))

    def _shape(self, bare: str) -> Shape:
        return tuple(self._files[bare].get_slice(self._names[bare]).get_shape())

    def _tensor(self, bare: str) -> Tensor:
        return self._files[bare].get_tensor(self._names[bare])

    def _check_tied(self, embeddings: Tensor) -> None:
        if not torch.equal(embeddings, self._tensor(_LM_HEAD)):
            raise CheckpointError(
                f"{self.path}: the configuration ties the embeddings, but {_LM_HEAD} differs "
                "from them"
            )

    def _stored_dtype(self) -> str:
        if not self._names:
            raise CheckpointError(f"{self.path}: the safetensors files hold no tensors")
        stored = {
            bare: self._files[bare].get_slice(name).get_dtype()
            for bare, name in self._names.items()
        }
        for bare, dtype in stored.items():
            if dtype not in _DTYPES:
                raise CheckpointError(
                    f"{self.path}: {self._names[bare]} is stored as {dtype} (known: "
                    f"{', '.join(_DTYPES)})"
                )
        embeddings = self._recipes[WORD_EMBEDDINGS].parts[0]
        return _DTYPES[stored.get(embeddings) or next(iter(stored.values()))]


def _indexed(names: list[str], path: Path, index: dict[str, str]) -> list[str]:
    """Names of one shard that the index places there; all that it places there must be there."""
    found = set(names)
    placed = {name for name, file in index.items() if file == path.name}
    if absent := sorted(placed - found):
        raise CheckpointError(f"{path} lacks {absent[0]}, which the index places there")
    if unlisted := sorted(found - index.keys()):
        raise CheckpointError(f"{path} holds {unlisted[0]}, which the index does not list")
    return [name for name in names if name in placed]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
