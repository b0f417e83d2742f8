"""Resolution of a model's name or folder to its configuration, weights and tokenizer.

A name is a folder (Hugging Face or Megatron) or, if no such folder exists, a file of
model_configs/. Nothing is downloaded. `source` decides the format of a folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sps2_mega.checkpoint.end_tokens import end_token_ids
from sps2_mega.checkpoint.hf_config import read_hf_config
from sps2_mega.checkpoint.model_file import model_files, named_model_file, read_model_file
from sps2_mega.checkpoint.source import iteration_folder, open_checkpoint
from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """Configuration and folders of a model; `path` is the folder of its weights.

    `tokenizer` is None if none was found (prompts are then token ids). Without a suggestion the
    degrees of parallelism are 1 and `csa` is None.
    """

    name: str
    config: ModelConfig
    path: Path
    tokenizer: Path | None
    suggested_tp: int = 1
    suggested_sp: int = 1
    csa: CSAConfig | None = None


def resolve_model(
    name_or_path: str | Path, *, tokenizer: str | Path | None = None, needs_weights: bool = True
) -> ResolvedModel:
    """Resolve a name or folder; `tokenizer` is a folder that replaces the model's own.

    Without `needs_weights` a folder with only a config.json is enough, or a name whose
    weights are elsewhere: `path` must then not be read.

    Raises:
        ConfigError: no such folder or name, weights not on this machine, or a model that cannot be
            run.
        CheckpointError: the folder is not a readable checkpoint.
    """
    given = Path(tokenizer) if tokenizer is not None else None
    if given is not None and not has_tokenizer(given):
        raise ConfigError(f"tokenizer {given}: no {' or '.join(TOKENIZER_FILES)} there")
    path = Path(name_or_path)
    if path.is_dir():
        config, tokens = _stated(path, needs_weights), given or tokenizer_folder(path)
        if tokens is not None and not config.eos_token_ids:
            config = replace(config, eos_token_ids=end_token_ids(tokens))
        return ResolvedModel(name=path.resolve().name, config=config, path=path, tokenizer=tokens)
    return _named_model(str(name_or_path), given, needs_weights)


def suggested_csa(name_or_path: str | Path) -> CSAConfig | None:
    """Sparse attention that `resolve_model` suggests, without looking at weights.

    None for a name that it refuses.
    """
    files = {} if Path(name_or_path).is_dir() else model_files()
    file = files.get(str(name_or_path))
    return None if file is None else read_model_file(file).csa


def tokenizer_folder(folder: Path) -> Path | None:
    """Folder of a checkpoint's tokenizer: the folder itself or the iteration that it points to."""
    return next((f for f in (folder, iteration_folder(folder)) if has_tokenizer(f)), None)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _stated(folder: Path, needs_weights: bool) -> ModelConfig:
    if not needs_weights and (folder / "config.json").is_file():
        return read_hf_config(folder)
    return open_checkpoint(folder).config


def _named_model(name: str, tokenizer: Path | None, needs_weights: bool) -> ResolvedModel:
    try:
        file = named_model_file(name)
    except ConfigError as error:
        raise ConfigError(f"model {name!r} is not a folder, and {error}") from None
    if needs_weights and (file.weights is None or not file.weights.is_dir()):
        where = "are not bundled" if file.weights is None else f"are not in {file.weights}"
        raise ConfigError(
            f"the weights of {name} {where}. They are published at {file.source}: download them "
            "and pass the "
            "folder as the model (a Hugging Face folder or a Megatron checkpoint)"
        )
    return ResolvedModel(
        name=name,
        config=file.config,
        path=file.weights or Path(name),
        tokenizer=tokenizer or file.tokenizer,
        suggested_tp=file.tp,
        suggested_sp=file.sp,
        csa=file.csa,
    )
