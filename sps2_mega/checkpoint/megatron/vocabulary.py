"""Tokens of a Megatron run: how many rows of its embedding are tokens, and which end a text.

Rows beyond the tokens are padding that no run ever trained, so a checkpoint, which states the
padded number, is read with the number that its tokenizer has:

    NullTokenizer      `vocab_size`, of releases before 0.18 one more: its end of document (EOD)
    TikTokenizer       `vocab_size`, by default 131072
    any other          what the tokenizer's folder holds; without one, `vocab_size`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sps2_mega.checkpoint.megatron.settings.arguments import OWN_CONFIG, model_config_from_args
from sps2_mega.checkpoint.megatron.settings.table import short
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.text.tokenizer import Tokenizer

_NULL_TOKENIZERS = ("NullTokenizer", "NullMultimodalTokenizer")
_TIKTOKEN_DEFAULT = 2**17
# Argument that came with NullTokenizers whose EOD is one of their `vocab_size` tokens (core 0.18).
_EOD_ARGUMENT = "null_tokenizer_eod_id"
_SPECIAL_ARGUMENTS = ("tokenizer_special_tokens", "special_tokens")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Number of tokens, and ids that end a text as far as the run's arguments say so."""

    size: int
    end_token_ids: tuple[int, ...] = ()


def config_of_run(args: Mapping[str, Any], tokens: Path | None, where: str) -> ModelConfig:
    """Architecture in a Megatron run's arguments, with the tokens of its tokenizer.

    `tokens` is the tokenizer's folder, if one was found or given; `where` starts every error
    message.

    Raises:
        ConfigError: the architecture is not one that runs, or the number of tokens is unknown.
    """
    if isinstance(args.get(OWN_CONFIG), Mapping):
        return model_config_from_args(args, where)
    vocabulary = vocabulary_of_run(args, tokens, where)
    config = model_config_from_args({**args, "vocab_size": vocabulary.size}, where)
    return replace(config, eos_token_ids=vocabulary.end_token_ids)


def vocabulary_of_run(args: Mapping[str, Any], tokens: Path | None, where: str) -> Vocabulary:
    """Tokens of a Megatron run, by the rules of its `tokenizer_type`.

    Raises:
        ConfigError: neither arguments nor `tokens` say how many there are, or they contradict.
    """
    kind, stated = args.get("tokenizer_type"), args.get("vocab_size")
    if kind is not None and not isinstance(kind, str):
        raise ConfigError(f"{where}: tokenizer_type={short(kind)} must be a text")
    if stated is not None and (type(stated) is not int or stated < 1):
        raise ConfigError(f"{where}: vocab_size must be an integer >= 1, found {stated!r}")
    if kind in _NULL_TOKENIZERS and stated is not None:
        return _null_vocabulary(args, kind, stated, where)
    if kind == "TikTokenizer":
        return Vocabulary(stated or _TIKTOKEN_DEFAULT)
    # Without a tokenizer's type, as in Bridge's section `model`, the number is the model's own.
    if stated is not None and (kind is None or tokens is None):
        return Vocabulary(stated)
    if tokens is not None:
        return Vocabulary(_with_special_arguments(Tokenizer.load(tokens), args, tokens, where))
    raise ConfigError(
        f"{where}: vocab_size is not stated, only padded_vocab_size="
        f"{args.get('padded_vocab_size')!r}, whose last rows may be padding: pass the tokenizer's "
        "folder with --tokenizer DIR, or the architecture with --config"
    )


def end_tokens_of_run(args: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Ids that a run's arguments alone say end a text, as those of NullTokenizers do.

    Raises:
        ConfigError: they contradict each other.
    """
    kind, stated = args.get("tokenizer_type"), args.get("vocab_size")
    if kind not in _NULL_TOKENIZERS or type(stated) is not int:
        return ()
    return _null_vocabulary(args, kind, stated, where).end_token_ids


def _null_vocabulary(args: Mapping[str, Any], kind: str, stated: int, where: str) -> Vocabulary:
    if kind != "NullTokenizer" or _EOD_ARGUMENT not in args:
        return Vocabulary(stated + 1, (stated,))
    given = args[_EOD_ARGUMENT]
    end = stated - 1 if given is None else given
    if type(end) is not int or not 0 <= end < stated:
        raise ConfigError(
            f"{where}: {_EOD_ARGUMENT}={given!r}: an id below vocab_size={stated} is needed"
        )
    return Vocabulary(stated, (end,))


def _with_special_arguments(
    tokenizer: Tokenizer, args: Mapping[str, Any], tokens: Path, where: str
) -> int:
    """Number of tokens, after checking that those which the run added are in the folder."""
    for name in _SPECIAL_ARGUMENTS:
        lacking = [text for text in args.get(name) or () if tokenizer.token_id(text) is None]
        if lacking:
            raise ConfigError(
                f"{where}: {name} adds {', '.join(map(repr, lacking))}, which the tokenizer in "
                f"{tokens} lacks: save it once with these tokens"
            )
    return tokenizer.vocab_size
