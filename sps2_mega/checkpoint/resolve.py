"""Resolution of a model's name or folder to its configuration, weights and tokenizer.

A name is a folder (Hugging Face or Megatron) or, if no such folder exists, a file of
model_configs/. Nothing is downloaded. `source` decides the format of a folder, `vocabulary` which
ids are tokens and which end a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sps2_mega.checkpoint.canonical import WORD_EMBEDDINGS
from sps2_mega.checkpoint.given_config import given_config
from sps2_mega.checkpoint.huggingface.config import read_hf_config
from sps2_mega.checkpoint.inventory import check_complete
from sps2_mega.checkpoint.model_file import model_files, named_model_file, read_model_file
from sps2_mega.checkpoint.source import is_huggingface, open_checkpoint, tokenizer_folder
from sps2_mega.checkpoint.vocabulary import (
    FILES,
    GENERATION,
    check_rows,
    stated_end_tokens,
    with_end_tokens,
)
from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.text.tokenizer_files import CONVERTIBLE_FILES, TOKENIZER_FILE, has_tokenizer


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
    name_or_path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    needs_weights: bool = True,
) -> ResolvedModel:
    """Resolve a name or folder; `tokenizer` is a folder that replaces the model's own.

    `config` is a name or a file whose architecture replaces the model's own (`given_config`);
    which tokens end a text is still for generation_config.json and the tokenizer to say.

    Without `needs_weights` a folder with only a config.json is enough, or a name whose
    weights are elsewhere: `path` must then not be read.

    Raises:
        ConfigError: no such folder or name, weights not on this machine, or a model that cannot be
            run.
        CheckpointError: the folder is not a readable checkpoint.
    """
    given = Path(tokenizer) if tokenizer is not None else None
    if given is not None and not has_tokenizer(given):
        files = ", ".join((TOKENIZER_FILE, *CONVERTIBLE_FILES))
        raise ConfigError(f"tokenizer {given}: none of {files} is there")
    path = Path(name_or_path)
    architecture = None if config is None else given_config(config)
    if path.is_dir():
        tokens = given or tokenizer_folder(path)
        if architecture is None:
            found = _stated(path, tokens, needs_weights)
        else:
            found = _given(architecture, path, tokens, needs_weights)
        return ResolvedModel(name=path.resolve().name, config=found, path=path, tokenizer=tokens)
    return _named_model(str(name_or_path), given, architecture, needs_weights)


def suggested_csa(name_or_path: str | Path) -> CSAConfig | None:
    """Sparse attention that `resolve_model` suggests, without looking at weights.

    None for a name that it refuses.
    """
    files = {} if Path(name_or_path).is_dir() else model_files()
    file = files.get(str(name_or_path))
    return None if file is None else read_model_file(file).csa


def _stated(folder: Path, tokens: Path | None, needs_weights: bool) -> ModelConfig:
    """Architecture of a folder, with its end tokens; its tokenizer is checked against its rows."""
    huggingface = is_huggingface(folder)
    if huggingface:
        stated_end_tokens(folder)  # before a value of another type gets further
    if huggingface and not needs_weights:
        config = read_hf_config(folder)
        rows = config.vocab_size
    else:
        source = open_checkpoint(folder, tokens=tokens)
        config = source.config
        rows = source.shapes().get(WORD_EMBEDDINGS, (config.vocab_size,))[0]
    return _with_tokens(config, tokens, rows, is_huggingface=huggingface)


def _given(
    config: ModelConfig, folder: Path, tokens: Path | None, needs_weights: bool
) -> ModelConfig:
    """A given architecture with the end tokens of a folder, after a look at the weights there."""
    huggingface = is_huggingface(folder)
    rows = config.vocab_size
    if needs_weights:
        source = open_checkpoint(folder, config, tokens=tokens)
        check_complete(source, config)
        config = source.config
        rows = source.shapes()[WORD_EMBEDDINGS][0]
    for place in (folder, tokens):
        if place is not None and (ends := stated_end_tokens(place, [GENERATION])):
            config = replace(config, eos_token_ids=ends)
            break
    return _with_tokens(config, tokens, rows, is_huggingface=huggingface, files=[GENERATION])


def _with_tokens(
    config: ModelConfig,
    tokens: Path | None,
    rows: int,
    *,
    is_huggingface: bool,
    files: Sequence[str] = FILES,
) -> ModelConfig:
    tokenizer = None if tokens is None else Tokenizer.load(tokens)
    if tokens is not None and tokenizer is not None:
        check_rows(tokens, tokenizer, config.vocab_size, rows, is_huggingface=is_huggingface)
    return with_end_tokens(config, tokens, tokenizer, files=files)


def _named_model(
    name: str, tokenizer: Path | None, architecture: ModelConfig | None, needs_weights: bool
) -> ResolvedModel:
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
    tokens = tokenizer or file.tokenizer
    folder = file.weights or Path(name)
    if architecture is None:
        rows = file.config.vocab_size
        config = _with_tokens(file.config, tokens, rows, is_huggingface=True)
    else:
        config = _given(architecture, folder, tokens, needs_weights)
    return ResolvedModel(
        name=name,
        config=config,
        path=folder,
        tokenizer=tokens,
        suggested_tp=file.tp,
        suggested_sp=file.sp,
        csa=file.csa,
    )
