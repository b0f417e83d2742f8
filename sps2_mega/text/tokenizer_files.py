"""A model folder's tokenizer as the `tokenizers` library runs it, from whatever files it has.

    tokenizer.json                       its own rules, with the added tokens of the files beside it
    tokenizer.model, tiktoken.model,     converted by transformers, which is imported only then
    tekken.json, vocab.json

Decides which files count and which tokens are added; `tokenizer_settings` reads what the small
files say, `tokenizer` encodes and decodes.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from sps2_mega.errors import ConfigError
from sps2_mega.text.chat_template import find_templates
from sps2_mega.text.tokenizer_schema import Token, content
from sps2_mega.text.tokenizer_settings import TokenSettings, read_token_settings

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
# In the order in which they are taken where there is no tokenizer.json.
CONVERTIBLE_FILES = ("tekken.json", "tokenizer.model", "tiktoken.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer in any form; its files are not opened."""
    return any((folder / name).is_file() for name in (TOKENIZER_FILE, *CONVERTIBLE_FILES))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """A tokenizer with all tokens of its folder, the named ones, and its chat templates by name."""

    backend: tokenizers.Tokenizer
    named: dict[str, str]
    templates: dict[str, str]


def load_tokenizer_parts(folder: Path) -> TokenizerParts:
    """Read or convert a folder's tokenizer.

    Raises:
        ConfigError: there is none, it cannot be read, or it asks for what is not done; says what
            to do.
    """
    if not has_tokenizer(folder):
        raise ConfigError(_missing_text(folder))
    if not (folder / TOKENIZER_FILE).is_file():
        from sps2_mega.text.tokenizer_conversion import convert_tokenizer

        converted = convert_tokenizer(folder)
        refuse_space_clean_up(converted.backend, converted.cleans_spaces, folder)
        templates = find_templates(folder, converted.templates)
        return TokenizerParts(backend=converted.backend, named=converted.named, templates=templates)
    backend, own = _read_tokenizer_json(folder / TOKENIZER_FILE)
    settings = read_token_settings(folder, own)
    refuse_space_clean_up(backend, settings.cleans_spaces, folder)
    _add_tokens(backend, settings, folder)
    backend.encode_special_tokens = settings.splits_special_tokens
    return TokenizerParts(
        backend=backend,
        named={name: content(token) for name, token in settings.named.items()},
        templates=find_templates(folder, settings.templates),
    )


def refuse_space_clean_up(backend: tokenizers.Tokenizer, cleans_spaces: bool, folder: Path) -> None:
    """Refuse texts that are changed after decoding: a stream could not show them piece by piece.

    Byte-pair tokenizers are never cleaned up, whatever the field says.
    """
    kind = type(backend.model).__name__
    if cleans_spaces and kind != "BPE":
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: clean_up_tokenization_spaces=true would remove "
            f"spaces from what a {kind} tokenizer decodes, which is not done here: set it to false"
        )


def _read_tokenizer_json(path: Path) -> tuple[tokenizers.Tokenizer, dict[int, Token]]:
    """The tokenizer of a tokenizer.json, and its added tokens by id."""
    try:
        text = path.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
        stated: list[dict[str, Any]] = json.loads(text).get("added_tokens") or []
    except Exception as error:  # noqa: BLE001 (the library raises plain Exception)
        raise ConfigError(f"{path} is not a tokenizer file: {error}") from None
    for token in stated:
        given = backend.token_to_id(token["content"])
        if given != token["id"]:
            raise ConfigError(
                f"{path}: added token {token['content']!r} is stated with id {token['id']}, but "
                f"the rest of the file gives it {given}"
            )
    return backend, {token_id: _as_token(token) for token_id, token in _added(backend).items()}


def _add_tokens(backend: tokenizers.Tokenizer, settings: TokenSettings, folder: Path) -> None:
    """Add what the files beside tokenizer.json name, in the order of transformers' generic class.

    A token that is in the vocabulary keeps its id and gets the flags; a new one gets the next id.
    """
    known = {
        token.content
        for token in settings.by_id.values()
        if backend.token_to_id(token.content) is not None
    }
    # Tokens of tokenizer.json too: flags of the other files count, and named ones are special.
    new: list[str | tokenizers.AddedToken] = [
        _library_token(token) for _, token in sorted(settings.by_id.items())
    ]
    seen = {token.content for token in _added(backend).values()}
    seen |= {token.content for token in settings.by_id.values()}
    for token in (*settings.named.values(), *settings.extra):
        wanted = token if isinstance(token, str) else _library_token(token)
        # The same token with other flags may come twice: the last one counts.
        if content(token) not in seen and wanted not in new:
            new.append(wanted)
    names = {content(token) for token in settings.named.values()}
    backend.add_tokens([_special_if(token, names) for token in new])
    for token_id, added in _added(backend).items():
        other = backend.model.id_to_token(token_id)
        if other not in (None, added.content):
            raise ConfigError(
                f"{folder}: added token {added.content!r} gets id {token_id}, which {other!r} has: "
                "the vocabulary of tokenizer.json lacks ids"
            )
    for token_id, token in settings.by_id.items():
        given = backend.token_to_id(token.content)
        if given == token_id:
            continue
        if token.content not in known:
            raise ConfigError(
                f"{folder}: added token {token.content!r} is stated with id {token_id}, but the "
                f"next free id is {given}: ids between are in no file"
            )
        logger.warning(
            "%s: %r has id %d in tokenizer.json, which counts; a file beside it says %d",
            folder,
            token.content,
            given,
            token_id,
        )


def _library_token(token: Token) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(**token.model_dump(exclude_none=True))


def _special_if(token: str | tokenizers.AddedToken, names: set[str]) -> tokenizers.AddedToken:
    """The token, special where it is a mere text or a named token."""
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    if token.content in names:
        token.special = True
    return token


def _as_token(token: tokenizers.AddedToken) -> Token:
    return Token(
        content=token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _added(backend: tokenizers.Tokenizer) -> dict[int, tokenizers.AddedToken]:
    return backend.get_added_tokens_decoder()


def _missing_text(folder: Path) -> str:
    if not folder.is_dir():
        return f"tokenizer folder {folder} does not exist"
    return (
        f"{folder} has no {TOKENIZER_FILE} (nor {', '.join(CONVERTIBLE_FILES)}); pass a folder "
        "that has one with --tokenizer"
    )
