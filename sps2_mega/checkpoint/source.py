"""Sources of weights in any format: every reader offers the canonical form through `WeightSource`.

    Hugging Face folder      config.json + *.safetensors                     `huggingface`
    Megatron torch_dist      iter_*/{metadata.json,.metadata,*.distcp}       `megatron.torch_dist`
    Megatron legacy          iter_*/mp_rank_XX[_YYY]/model_optim_rng.pt      `megatron.legacy`

Opening a source reads headers only. This file chooses the reader of a folder;
`inventory` decides what must be in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sps2_mega.checkpoint.canonical import VOCAB_NAMES
from sps2_mega.checkpoint.huggingface.files import refuse_adapter
from sps2_mega.checkpoint.huggingface.source import HuggingFaceSource
from sps2_mega.checkpoint.megatron import legacy, run
from sps2_mega.checkpoint.megatron.hybrid import HybridSource
from sps2_mega.checkpoint.megatron.legacy import LegacySource
from sps2_mega.checkpoint.megatron.metadata import read_metadata
from sps2_mega.checkpoint.megatron.safe_pickle import load_torch_file
from sps2_mega.checkpoint.megatron.settings.arguments import OWN_CONFIG
from sps2_mega.checkpoint.megatron.torch_dist import TorchDistSource
from sps2_mega.checkpoint.weight_source import WeightSource
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError
from sps2_mega.text.tokenizer_files import has_tokenizer

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "latest_train_state.pt"


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
    if is_huggingface(folder):
        return HuggingFaceSource(folder, config)
    iteration = iteration_folder(folder)
    tokens = tokens or tokenizer_folder(folder)
    if (iteration / ".metadata").is_file():
        return _as_gpt(TorchDistSource(iteration, config, tokens=tokens))
    if any(iteration.glob("mp_rank_*")):
        return _as_gpt(LegacySource(iteration, config, tokens=tokens))
    raise CheckpointError(f"{iteration}: not a known checkpoint: {_found(iteration)}")


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model, also one without its config.json.

    A config.json beside Megatron's files is none.

    Raises:
        CheckpointError: it is both.
    """
    stated = (folder / "config.json").is_file()
    weights = any(folder.glob("*.safetensors"))
    if not any((folder / name).is_file() for name in (TRACKER, TRAIN_STATE, ".metadata")):
        return stated or weights
    if stated and weights:
        raise CheckpointError(
            f"{folder} holds a Hugging Face model and a Megatron checkpoint: move one of them, or "
            "pass the folder of an iteration"
        )
    return False


def read_canonical(source: WeightSource, name: str, config: ModelConfig) -> Tensor:
    """Read one canonical tensor without the vocabulary rows that a file may have as padding."""
    tensor = source.read(name)
    return tensor[: config.vocab_size] if name in VOCAB_NAMES else tensor


def stored_settings(folder: Path) -> dict[str, Any]:
    """Settings that decide the architecture of a Megatron checkpoint; empty where none do.

    None do of a Hugging Face folder, and of one that was written here, which states all of its
    architecture at once. `open_checkpoint` may refuse what they say.

    Raises:
        CheckpointError: they would run code or are damaged.
        ConfigError: run_config.yaml cannot be read.
    """
    if not folder.is_dir() or is_huggingface(folder):
        return {}
    iteration = iteration_folder(folder)
    args: dict[str, Any] = {}
    if (iteration / ".metadata").is_file():
        args, _, _ = run.stored_args(iteration, read_metadata(iteration), given=True)
    elif any(iteration.glob("mp_rank_*")):
        args = legacy.stored_args(iteration)
    return {} if OWN_CONFIG in args else run.settings_of_gpt(args)


def _as_gpt(source: TorchDistSource | LegacySource) -> WeightSource:
    return source if source.pattern is None else HybridSource(source, source.pattern)


def iteration_folder(folder: Path) -> Path:
    """Folder of the files: `folder` itself, or the one that a tracker file points to.

    Bridge keeps a tracker of its own beside Megatron-LM's, and believes its own.
    """
    for tracker, read in ((TRAIN_STATE, _step_of_bridge), (TRACKER, _step_of_megatron)):
        if (folder / tracker).is_file():
            name = read(folder / tracker)
            if not (folder / name).is_dir():
                raise CheckpointError(
                    f"{folder / tracker} points to {name}, which is not in {folder}"
                )
            return folder / name
    return folder


def _step_of_megatron(tracker: Path) -> str:
    with tracker.open(encoding="utf-8", errors="replace") as file:
        text = file.read(100).strip()
    if text != "release" and not (text.isascii() and text.isdecimal()):
        raise CheckpointError(f"{tracker} must hold a number or 'release', found {text[:40]!r}")
    return "release" if text == "release" else f"iter_{int(text[:19]):07d}"


def _step_of_bridge(tracker: Path) -> str:
    state = load_torch_file(tracker)
    step = state.get("step") if isinstance(state, dict) else None
    if isinstance(step, Tensor) and step.numel() == 1 and step.device.type == "cpu":
        step = step.item()
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
        raise CheckpointError(f"{tracker} must hold a `step`, found {str(step)[:40]}")
    return f"iter_{step:07d}"


def tokenizer_folder(folder: Path) -> Path | None:
    """Folder of a checkpoint's tokenizer; None if none lies with it.

    With the weights first: of a Megatron checkpoint the iteration's `tokenizer/` (Bridge) and the
    iteration itself, then its root and the root's `tokenizer/`.
    """
    places = [folder, folder / "tokenizer"]
    if not is_huggingface(folder):
        iteration = iteration_folder(folder)
        root = folder if iteration != folder else folder.parent
        places = [iteration / "tokenizer", iteration]
        if iteration != folder or any((root / name).is_file() for name in (TRACKER, TRAIN_STATE)):
            places += [root, root / "tokenizer"]
    return next((place for place in places if has_tokenizer(place)), None)


def _found(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())[:8]
    return (
        "expected config.json (Hugging Face), metadata.json or .metadata (Megatron torch_dist) "
        "or mp_rank_* "
        f"(Megatron legacy), found {', '.join(names) or 'an empty folder'}"
    )
