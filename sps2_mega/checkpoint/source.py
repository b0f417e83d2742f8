"""Sources of weights in any format: every reader offers the canonical form through `WeightSource`.

    Hugging Face folder      config.json + *.safetensors                     `huggingface`
    Megatron torch_dist      iter_*/{metadata.json,.metadata,*.distcp}       `megatron.torch_dist`
    Megatron legacy          iter_*/mp_rank_XX[_YYY]/model_optim_rng.pt      `megatron.legacy`

Opening a source reads headers only. This file chooses the reader of a folder;
`inventory` decides what must be in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sps2_mega.checkpoint.canonical import VOCAB_NAMES, Shape
from sps2_mega.checkpoint.huggingface.files import refuse_adapter
from sps2_mega.checkpoint.huggingface.source import HuggingFaceSource
from sps2_mega.checkpoint.megatron.legacy import LegacySource
from sps2_mega.checkpoint.megatron.torch_dist import TorchDistSource
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError
from sps2_mega.text.tokenizer_files import has_tokenizer

TRACKER = "latest_checkpointed_iteration.txt"
# Files by which the root of a Megatron checkpoint is known, Bridge's own included.
_ROOT_FILES = (TRACKER, "latest_train_state.pt")


class WeightSource(Protocol):
    """One checkpoint, as canonical tensors.

    `saved_layout` is the writer's (tp, pp) if the format records it. `dtype` is the
    stored one (`bfloat16`, ..). `shapes()` maps canonical names to the shapes found,
    and includes, under their own names, tensors of the file that are not part of the
    model. `origin(name)` is the name in the file.
    """

    path: Path
    format: str
    config: ModelConfig
    iteration: int | None
    saved_layout: tuple[int, int] | None
    dtype: str

    def shapes(self) -> Mapping[str, Shape]: ...

    def read(self, name: str) -> Tensor: ...

    def origin(self, name: str) -> str: ...


def open_checkpoint(
    path: str | Path, config: ModelConfig | None = None, *, tokens: Path | None = None
) -> WeightSource:
    """Open a folder in any known format; `config` replaces the architecture that it states.

    `tokens` is the folder of the tokenizer, which says how many rows of a Megatron checkpoint are
    tokens; by default the one that lies with the checkpoint.

    Raises:
        CheckpointError: no known format, an unreadable file, or one that would run code.
        ConfigError: the architecture is not stated, or cannot be run.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    refuse_adapter(folder)
    if (folder / "config.json").is_file():
        return HuggingFaceSource(folder, config)
    iteration = iteration_folder(folder)
    tokens = tokens or tokenizer_folder(folder)
    if (iteration / ".metadata").is_file():
        return TorchDistSource(iteration, config, tokens=tokens)
    if any(iteration.glob("mp_rank_*")):
        return LegacySource(iteration, config, tokens=tokens)
    raise CheckpointError(f"{iteration}: not a known checkpoint: {_found(iteration)}")


def read_canonical(source: WeightSource, name: str, config: ModelConfig) -> Tensor:
    """Read one canonical tensor without the vocabulary rows that a file may have as padding."""
    tensor = source.read(name)
    return tensor[: config.vocab_size] if name in VOCAB_NAMES else tensor


def iteration_folder(folder: Path) -> Path:
    """Folder of the files: `folder` itself, or the one that a Megatron tracker file points to."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    text = tracker.read_text(encoding="utf-8").strip()
    if text != "release" and not text.isdecimal():
        raise CheckpointError(f"{tracker} must hold a number or 'release', found {text[:40]!r}")
    target = folder / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not target.is_dir():
        raise CheckpointError(f"{tracker} points to {target.name}, which is not in {folder}")
    return target


def tokenizer_folder(folder: Path) -> Path | None:
    """Folder of a checkpoint's tokenizer; None if none lies with it.

    With the weights first: of a Megatron checkpoint the iteration's `tokenizer/` (Bridge) and the
    iteration itself, then its root and the root's `tokenizer/`.
    """
    places = [folder, folder / "tokenizer"]
    if not (folder / "config.json").is_file():
        iteration = iteration_folder(folder)
        root = folder if iteration != folder else folder.parent
        places = [iteration / "tokenizer", iteration]
        if iteration != folder or any((root / name).is_file() for name in _ROOT_FILES):
            places += [root, root / "tokenizer"]
    return next((place for place in places if has_tokenizer(place)), None)


def _found(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())[:8]
    return (
        "expected config.json (Hugging Face), metadata.json or .metadata (Megatron torch_dist) "
        "or mp_rank_* "
        f"(Megatron legacy), found {', '.join(names) or 'an empty folder'}"
    )
