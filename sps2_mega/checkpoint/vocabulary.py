"""Tokens of a model beside its weights: whether the tokenizer fits the rows, which ids end a text.

Which ids end a text is stated in generation_config.json or config.json, and named by the
tokenizer. A Hugging Face folder states the number of tokens in config.json, and all of its rows
are tokens; `megatron.vocabulary` finds the number of a Megatron checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sps2_mega.checkpoint.json_file import read_json
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
FILES = (GENERATION, "config.json")


def check_rows(
    tokens: Path, tokenizer: Tokenizer, size: int, rows: int, *, is_huggingface: bool
) -> None:
    """Refuse a tokenizer that has more tokens than a model of `size` tokens in `rows` rows.

    A model may lack rows for added tokens (a padding token, say), as folders of Hugging Face do:
    there as in transformers only prompts that use them are refused.

    Raises:
        ConfigError: the tokenizer cannot be the model's.
    """
    if not is_huggingface and tokenizer.vocab_size > rows:
        raise ConfigError(_too_large(tokens, tokenizer.vocab_size, rows))
    limit = min(size, rows)
    if tokenizer.vocab_size <= limit:
        return
    if tokenizer.base_vocab_size > limit:
        raise ConfigError(_too_large(tokens, tokenizer.base_vocab_size, limit))
    log.warning(
        "%s: added tokens up to id %d have no row in a model of %d tokens: prompts with them are "
        "refused",
        tokens,
        tokenizer.vocab_size - 1,
        limit,
    )


def _too_large(tokens: Path, size: int, limit: int) -> str:
    return (
        f"{tokens}: the tokenizer has {size} tokens, but the model has rows for {limit}: it is "
        "another model's tokenizer"
    )


def with_end_tokens(
    config: ModelConfig,
    tokens: Path | None,
    tokenizer: Tokenizer | None,
    *,
    files: Sequence[str] = FILES,
) -> ModelConfig:
    """`config` with all ids that end a text: those stated, and the tokenizer's `eos_token`.

    Where `config` states none, `files` of the tokenizer's folder are asked.

    Raises:
        ConfigError: a file states something else than ids.
    """
    stated = config.eos_token_ids
    if not stated and tokens is not None:
        stated = stated_end_tokens(tokens, files)
    named = () if tokenizer is None else tokenizer.eos_token_ids
    ids = dict.fromkeys((*stated, *named))
    # A token without a row is never sampled.
    return replace(config, eos_token_ids=tuple(i for i in ids if i < config.vocab_size))


def stated_end_tokens(folder: Path, files: Sequence[str] = FILES) -> tuple[int, ...]:
    """Ids in the first of `files` that states any; empty if none does."""
    for name in files:
        path = folder / name
        if path.is_file() and (ids := end_tokens_in(read_json(path), path)) is not None:
            return ids
    return ()


def end_tokens_in(content: Mapping[str, Any], path: Path) -> tuple[int, ...] | None:
    """Ids of a file's `eos_token_id`; None where it states none.

    Raises:
        ConfigError: it is neither an id nor a list of ids.
    """
    value = content.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ConfigError(
            f"{path}: eos_token_id={value!r}: a token id (an integer >= 0) or a list of ids is "
            "needed"
        )
    return tuple(ids)
