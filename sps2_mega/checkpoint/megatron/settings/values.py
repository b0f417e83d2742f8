"""Reading of values that two vocabularies name differently."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sps2_mega.checkpoint.megatron.settings.table import short
from sps2_mega.errors import ConfigError

_TOO_LARGE = 1e300


def size(args: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """A setting that counts something; None and 0 stand for `default`, where there is one.

    Raises:
        ConfigError: it is absent and has no default, or it is no positive integer.
    """
    value = args.get(name)
    if not value and value is not False and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: {name} must be an integer of at least 1, found {short(value)}")
    return value


def number(
    args: Mapping[str, Any], names: tuple[str, ...], where: str, *, above: float = -math.inf
) -> float | None:
    """The value under one of `names`, None if it is absent under all of them.

    Raises:
        ConfigError: it is no number greater than `above`, or two names have different values.
    """
    given = {name: args[name] for name in names if args.get(name) is not None}
    for name, value in given.items():
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not known or not above < value < _TOO_LARGE:
            needs = "a number" if above == -math.inf else f"a number above {above:g}"
            raise ConfigError(f"{where}: {name} must be {needs}, found {short(value)}")
    if len({float(value) for value in given.values()}) > 1:
        both = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(f"{where}: {both} contradict each other")
    return float(next(iter(given.values()))) if given else None


def refuse(where: str, name: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"{where}: {name}={short(value)} is not supported: {why}")
