"""Reader of Hugging Face safetensors folders, sharded or not, one tensor at a time.

Files are memory-mapped: opening reads headers, `read` touches the pages of one canonical tensor.
`hf_layout` maps file tensors to canonical ones. Names may have the usual prefix (`model.`,
`transformer.`) or none, as in saved base models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sps2_mega.checkpoint import hf_layout
from sps2_mega.checkpoint.canonical import OUTPUT_LAYER, WORD_EMBEDDINGS, Shape
from sps2_mega.checkpoint.hf_config import read_hf_config, read_json
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LM_HEAD = "lm_head.weight"


class HuggingFaceSource:
    """A `WeightSource` over safetensors files, whose set of tensors is fixed once it is open."""

    format = "huggingface"
    iteration: int | None = None
    saved_layout: tuple[int, int] | None = None

    def __init__(self, folder: Path, config: ModelConfig | None = None) -> None:
        self.path = folder
        self.config = config or read_hf_config(folder)
        self._files: dict[str, Any] = {}  # name of a file's tensor without prefix -> open file
        self._names: dict[str, str] = {}  # the same key -> name in the file
        prefix = hf_layout.prefix(self.config)
        for path in weight_files(folder):
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118 (the handle is not a mapping)
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
        embeddings = self._recipes[WORD_EMBEDDINGS].parts[0]
        bare = embeddings if embeddings in self._names else next(iter(self._names))
        stored = self._files[bare].get_slice(self._names[bare]).get_dtype()
        if stored not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {self._names[bare]} is stored as {stored} (known: "
                f"{', '.join(_DTYPES)})"
            )
        return _DTYPES[stored]


def weight_files(folder: Path) -> list[Path]:
    """Safetensors files of a folder, as listed in its index if there is one.

    Raises:
        CheckpointError: none, or the index names files that are absent or outside the folder.
    """
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{index} names files outside the folder: {', '.join(outside)}")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(f"{index} names files that are absent: {', '.join(absent)}")
        return [folder / name for name in names]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} has {', '.join(pickled[:3])} only: pickled weights are not read, "
            "save the model as safetensors"
        )
    raise CheckpointError(f"{folder} has no .safetensors files")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
