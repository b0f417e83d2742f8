"""Token settings beside a tokenizer.json: which tokens are added, special or named, and templates.

    tokenizer_config.json     named tokens, added_tokens_decoder, extra_special_tokens, templates
    special_tokens_map.json   named and extra tokens; counts only without added_tokens_decoder
    added_tokens.json         ids of added tokens; likewise

Files are joined in the order in which transformers' generic class (`PreTrainedTokenizerFast`) takes
them; `tokenizer_schema` checks their fields, `tokenizer_files` applies the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sps2_mega.errors import ConfigError
from sps2_mega.text.tokenizer_schema import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TOKEN,
    TOKENIZER_CONFIG,
    NamedTemplate,
    Token,
    TokenizerConfig,
    TokenOrText,
    checked,
    content,
    read_json_object,
)

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_OLD_LIST, _LIST = "additional_special_tokens", "extra_special_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSettings:
    """What a folder's files say of its tokens; `by_id` are added tokens with the id they want."""

    by_id: dict[int, Token] = field(default_factory=dict)
    named: dict[str, TokenOrText] = field(default_factory=dict)
    extra: tuple[TokenOrText, ...] = ()
    templates: dict[str, str] = field(default_factory=dict)
    cleans_spaces: bool = False
    splits_special_tokens: bool = False


def read_token_settings(folder: Path, own: Mapping[int, Token]) -> TokenSettings:
    """Settings of a folder; `own` are the added tokens of its tokenizer.json.

    Raises:
        ConfigError: a file is not JSON, has a field of another type, or asks for what is not done.
    """
    path = folder / "tokenizer_config.json"
    config = checked(TOKENIZER_CONFIG, read_json_object(path), path)
    _refuse_what_is_not_done(config, path)
    tokens = _Tokens(
        named={name: value for name in NAMED_TOKENS if (value := getattr(config, name)) is not None}
    )
    tokens.take_names_of_model(config.model_extra or {}, path)
    tokens.take_lists(
        {
            name: getattr(config, name)
            for name in (_OLD_LIST, _LIST)
            if name in config.model_fields_set
        }
    )
    if config.added_tokens_decoder is not None:
        by_id = {_id(text, path): token for text, token in config.added_tokens_decoder.items()}
    else:
        tokens.take_special_map(folder / "special_tokens_map.json")
        by_id = _legacy_added(folder / "added_tokens.json", tokens.special_texts()) | dict(own)
    flags = {token.content: token for token in by_id.values()}
    return TokenSettings(
        by_id=by_id,
        named=tokens.in_order(flags),
        extra=tokens.extra(),
        templates=_templates(config.chat_template),
        cleans_spaces=bool(config.clean_up_tokenization_spaces),
        splits_special_tokens=bool(config.split_special_tokens),
    )


def _refuse_what_is_not_done(config: TokenizerConfig, path: Path) -> None:
    if config.fix_mistral_regex:
        raise ConfigError(
            f"{path}: fix_mistral_regex=true changes tokenizer.json's rules while it is loaded, "
            "which is not done here: save the tokenizer once with transformers"
        )
    versions = [name for name in config.fast_tokenizer_files or [] if name != "tokenizer.json"]
    if versions:
        raise ConfigError(
            f"{path}: fast_tokenizer_files names {', '.join(versions)}: only tokenizer.json is read"
        )


class _MapToken(Token):
    """A token of special_tokens_map.json, which is special by that."""


@dataclass(slots=True)
class _Tokens:
    """Named and extra tokens while files are joined: named ones, those that only the model's own
    class would know, and lists by the field that they stand in."""

    named: dict[str, TokenOrText]
    own_names: dict[str, TokenOrText] = field(default_factory=dict)
    lists: dict[str, list[TokenOrText] | None] = field(default_factory=dict)

    def take_names_of_model(self, fields: Mapping[str, Any], path: Path) -> None:
        """Named tokens beyond the usual ones, such as `image_token`."""
        for name, value in fields.items():
            if not name.endswith("_token"):
                continue
            if isinstance(value, str):
                self.own_names[name] = value
            elif isinstance(value, dict) and value.get("__type") == "AddedToken":
                self.named[name] = checked(TOKEN, value, path)

    def take_lists(self, stated: Mapping[str, Any]) -> None:
        """The two fields of extra tokens: the newer one counts unless it is empty."""
        stated = dict(stated)
        if _OLD_LIST in stated and not stated.get(_LIST):
            stated[_LIST] = stated.pop(_OLD_LIST)
        if isinstance(stated.get(_LIST), dict):
            self.own_names |= stated.pop(_LIST)
        self.lists = stated

    def take_special_map(self, path: Path) -> None:
        """Values of special_tokens_map.json, which take precedence."""
        for name, value in checked(SPECIAL_TOKENS_MAP, read_json_object(path), path).items():
            if isinstance(value, list):
                known = (self.lists.get(_LIST) or []) if name == _LIST else []
                self.lists[name] = known + [
                    token for token in map(_of_map, value) if token not in known
                ]
            elif isinstance(value, dict):
                if name == _LIST:
                    self.own_names |= value
                    self.lists.pop(_LIST, None)
            elif value is None:
                self.named.pop(name, None)
            elif name.endswith("_token"):
                self.named[name] = _of_map(value)

    def special_texts(self) -> set[str]:
        """Contents of tokens that added_tokens.json need not call special: not those whose flags
        tokenizer_config.json gives."""
        named = [self.named[name] for name in NAMED_TOKENS if name in self.named]
        tokens = [*named, *(self.lists.get(_LIST) or [])]
        return {content(token) for token in tokens if isinstance(token, str | _MapToken)}

    def in_order(self, flags: Mapping[str, Token]) -> dict[str, TokenOrText]:
        """Named tokens, with the flags of added tokens of the same content.

        The order decides the ids of tokens that have none yet: first the usual names, in theirs.
        """
        usual = {
            name: flags.get(content(self.named[name]), self.named[name])
            for name in NAMED_TOKENS
            if name in self.named
        }
        return usual | {n: t for n, t in self.named.items() if n not in usual} | self.own_names

    def extra(self) -> tuple[TokenOrText, ...]:
        name = _LIST if _LIST in self.lists else _OLD_LIST
        return tuple(self.lists.get(name) or ())


def _of_map(token: TokenOrText) -> TokenOrText:
    if isinstance(token, str):
        return token
    return _MapToken(**token.model_dump() | {"special": True})


def _legacy_added(path: Path, special: set[str]) -> dict[int, Token]:
    return {
        token_id: Token(content=text, normalized=text not in special, special=text in special)
        for text, token_id in checked(ADDED_TOKENS, read_json_object(path), path).items()
    }


def _id(text: str, path: Path) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{path}: added_tokens_decoder: {text!r} must be a token id")
    return int(text)


def _templates(value: str | list[NamedTemplate] | dict[str, str] | None) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {entry.name: entry.template for entry in value}
    return value or {}
