"""Strict conversion between a ModelConfig and a plain mapping (YAML, JSON).

Unknown, absent or mistyped fields are errors.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from sps2_mega.config import ModelConfig, RopeConfig
from sps2_mega.errors import ConfigError

_MOST = {
    "num_layers": 10_000,
    "hidden_size": 2**24,
    "ffn_hidden_size": 2**24,
    "num_heads": 2**24,
    "num_kv_heads": 2**24,
    "head_dim": 2**24,
    "vocab_size": 2**31 - 1,
    "max_position_embeddings": 2**31 - 1,
}

_T = typing.TypeVar("_T")


def model_config_from_mapping(fields: Mapping[str, Any], where: str) -> ModelConfig:
    """Build a ModelConfig; `where` starts every error message.

    `rope: null` means learned positions.

    Raises:
        ConfigError: names the field, the value found, and the known or needed ones.
    """
    fields = dict(fields)
    if isinstance(fields.get("rope"), Mapping):
        fields["rope"] = _build(RopeConfig, fields["rope"], f"{where}: rope")
    return _build(ModelConfig, fields, where)


def model_config_to_mapping(config: ModelConfig) -> dict[str, Any]:
    """Convert to plain values, so that any format can hold them and no reader needs our classes."""
    fields = dataclasses.asdict(config)
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


def check_keys(given: Mapping[str, Any], known: typing.Collection[str], where: str) -> None:
    if unknown := [str(key) for key in given if key not in known]:
        raise ConfigError(f"{where}: unknown {', '.join(unknown)} (known: {', '.join(known)})")


def check_ranges(config: ModelConfig, where: str) -> None:
    """Check sizes against what any real model has, so that a wrong one is found at once.

    Raises:
        ConfigError: names the field, its value and the range.
    """
    for name, most in _MOST.items():
        value = getattr(config, name)
        if not 1 <= value <= most:
            raise ConfigError(f"{where}: {name}={value} must be from 1 to {most}")
    if not 0 <= config.norm_eps < 1:
        raise ConfigError(f"{where}: norm_eps={config.norm_eps} must be >= 0 and below 1")
    if config.rope is not None and not 1 < config.rope.theta < math.inf:
        raise ConfigError(f"{where}: rope: theta={config.rope.theta} must be above 1 and finite")


def _build(cls: type[_T], given: Mapping[str, Any], where: str) -> _T:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(given, fields, where)
    missing = dataclasses.MISSING
    absent = [
        name
        for name, field in fields.items()
        if field.default is missing and field.default_factory is missing and name not in given
    ]
    if absent:
        raise ConfigError(f"{where}: needs {', '.join(absent)}")
    hints = typing.get_type_hints(cls)
    values = {
        name: _convert(value, hints[name], f"{where}: {name}") for name, value in given.items()
    }
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (typing.Union, UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(_convert(item, get_args(option)[0], where) for item in value)
        if option is NoneType and value is None:
            return None
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and isinstance(value, option):
            if isinstance(value, bool) and option is not bool:
                continue
            return value
    hint_text = " or ".join(_describe(option) for option in options)
    tip = " (write a float as 1.0e-5)" if float in options and isinstance(value, str) else ""
    raise ConfigError(f"{where} must be {hint_text}, found {value!r}{tip}")


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in get_args(option))
    if get_origin(option) is tuple:
        return f"a list of {_describe(get_args(option)[0])}"
    return "null" if option is NoneType else option.__name__
