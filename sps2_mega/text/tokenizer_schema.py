"""Form of the small files beside a tokenizer.json, field by field, as pydantic checks them.

A wrong value is one line: file, field, value, what is needed. `tokenizer_settings` joins the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sps2_mega.errors import ConfigError

_T = TypeVar("_T")


class Token(BaseModel):
    """An added token with its flags; `normalized` None means: unless it is special."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    content: Annotated[str, Field(min_length=1)]
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


class NamedTemplate(BaseModel):
    """One entry of a list of chat templates."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    template: str


TokenOrText = str | Token
TokenId = Annotated[int, Field(ge=0)]


class TokenizerConfig(BaseModel):
    """The fields of tokenizer_config.json that change tokens or texts; others stay unread."""

    model_config = ConfigDict(extra="allow", strict=True)

    bos_token: TokenOrText | None = None
    eos_token: TokenOrText | None = None
    unk_token: TokenOrText | None = None
    sep_token: TokenOrText | None = None
    pad_token: TokenOrText | None = None
    cls_token: TokenOrText | None = None
    mask_token: TokenOrText | None = None
    additional_special_tokens: list[TokenOrText] | None = None
    extra_special_tokens: list[TokenOrText] | dict[str, TokenOrText] | None = None
    added_tokens_decoder: dict[str, Token] | None = None
    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool | None = None
    fix_mistral_regex: bool | None = None
    fast_tokenizer_files: list[str] | None = None


TOKENIZER_CONFIG = TypeAdapter(TokenizerConfig)
SPECIAL_TOKENS_MAP = TypeAdapter(
    dict[
        str,
        Annotated[
            str | Token | list[TokenOrText] | dict[str, TokenOrText] | None,
            Field(union_mode="left_to_right"),
        ],
    ],
    config=ConfigDict(strict=True),
)
ADDED_TOKENS = TypeAdapter(dict[str, TokenId], config=ConfigDict(strict=True))
TOKEN = TypeAdapter(Token)


def content(token: TokenOrText) -> str:
    return token if isinstance(token, str) else token.content


def checked(adapter: TypeAdapter[_T], value: Any, path: Path) -> _T:
    """`value` in the adapter's type.

    Raises:
        ConfigError: it is not; one line with the file, the field, its value and what is needed.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        # Of a field that may have several types, the error that is deepest in the value.
        errors = error.errors(include_url=False)
        first = max(errors, key=lambda entry: len(_place(entry["loc"])))
        where, shown = ".".join(_place(first["loc"])), repr(first["input"])
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ConfigError(f"{path}: {where or 'content'}={shown}: {first['msg']}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty where there is no file.

    Raises:
        ConfigError: it is not a JSON object in UTF-8.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON in UTF-8: {type(error).__name__}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _place(parts: tuple[str | int, ...]) -> list[str]:
    # pydantic puts the members of a union into a location: `eos_token.Token.content`.
    return [str(part) for part in parts if part not in ("str", "Token") and "[" not in str(part)]
