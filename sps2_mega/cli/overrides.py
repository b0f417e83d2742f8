"""`--override FIELD=VALUE`: config fields by their dotted path, typed by the field."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from sps2_mega.cli.flags import FieldSpec
from sps2_mega.errors import ConfigError

_NUM_NEAREST = 3


def values_of(overrides: Iterable[str], fields: Mapping[str, FieldSpec]) -> dict[str, Any]:
    """Values by path; of several for one field the last counts, as with flags.

    Raises:
        ConfigError: a text is not FIELD=VALUE, the field is unknown, or the value has another type.
    """
    found = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"--override needs FIELD=VALUE, as csa.halo=256; got {text!r}")
        if path not in fields:
            raise ConfigError(
                f"--override {text}: there is no field {path!r}; nearest are "
                f"{', '.join(nearest(path, fields))}"
            )
        found[path] = _value(fields[path], value, text)
    return found


def nearest(path: str, fields: Iterable[str]) -> list[str]:
    """Fields that `path` may have meant, likeliest first: the same last name, then similar ones."""
    known = list(fields)
    last = path.rpartition(".")[2]
    similar = difflib.get_close_matches(path, known, n=_NUM_NEAREST, cutoff=0.0)
    by_last = {each.rpartition(".")[2]: each for each in reversed(known)}
    likely = [by_last[name] for name in difflib.get_close_matches(last, by_last, cutoff=0.8)]
    return list(dict.fromkeys([*likely, *similar]))[:_NUM_NEAREST]


def _value(spec: FieldSpec, value: str, text: str) -> Any:
    if spec.optional and value.lower() == "none":
        return None
    try:
        read = spec.read(value)
    except (ValueError, argparse.ArgumentTypeError):
        read = None
    if read is None or (spec.choices is not None and read not in spec.choices):
        kind = "one of " + ", ".join(spec.choices) if spec.choices else _NAMES[spec.metavar]
        none = " or none" if spec.optional else ""
        raise ConfigError(f"--override {text}: {spec.path} is {kind}{none}, got {value!r}")
    return read


_NAMES = {
    "N": "an integer",
    "X": "a number",
    "N,N": "integers with commas",
    "true|false": "true or false",
    "NAME": "a text",
}
