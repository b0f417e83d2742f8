"""Command-line flags from config dataclasses, and config dataclasses back from parsed flags.

A field is a flag only if it was declared with `config.flag`; defaults stay in the dataclasses, so a
flag that is not given is not set. Which commands exist is `cli`'s.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagSpec:
    """One flag: where its value goes (field names from the outermost dataclass in) and how it
    reads."""

    path: tuple[str, ...]
    name: str
    help: str
    default: Any
    choices: tuple[str, ...] | None
    read: Callable[[str], Any]
    metavar: str

    @property
    def dest(self) -> str:
        return ".".join(self.path)


def flags_of(config: type, path: tuple[str, ...] = ()) -> Iterator[FlagSpec]:
    """The flags of a dataclass, nested ones included, in the order of their fields."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags_of(hints[field.name], (*path, field.name))
        elif "flag" in field.metadata:
            given = field.metadata["flag"]
            read, metavar = _reader(hints[field.name])
            yield FlagSpec(
                path=(*path, field.name),
                name=given["name"] or field.name.replace("_", "-"),
                help=given["help"],
                default=field.default,
                choices=given["choices"],
                read=read,
                metavar=metavar,
            )


def add_flags(parser: argparse._ActionsContainer, config: type) -> None:
    """Adds the flags of `config`; what is not given on the command line stays absent."""
    for spec in flags_of(config):
        if spec.read is bool:
            parser.add_argument(
                f"--{spec.name}",
                dest=spec.dest,
                action="store_true",
                default=argparse.SUPPRESS,
                help=spec.help.replace("%", "%%"),
            )
            continue
        text = (
            spec.help if spec.default is None else f"{spec.help} (default: {_shown(spec.default)})"
        )
        parser.add_argument(
            f"--{spec.name}",
            dest=spec.dest,
            type=spec.read,
            choices=spec.choices,
            default=argparse.SUPPRESS,
            metavar=None if spec.choices else spec.metavar,
            help=text.replace("%", "%%"),
        )


def config_from(config: type[Config], parsed: argparse.Namespace) -> Config:
    """The dataclass with what was given; everything else keeps its default."""
    return _build(config, vars(parsed), ())


def _build(config: type[Config], given: dict[str, Any], path: tuple[str, ...]) -> Config:
    hints = typing.get_type_hints(config)
    values = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        place = (*path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = _build(hints[field.name], given, place)
        elif ".".join(place) in given:
            values[field.name] = given[".".join(place)]
    return config(**values)


def _reader(hint: Any) -> tuple[Callable[[str], Any], str]:
    """How to read a value of a type: bool (a flag without a value), int, float, str, a Literal of
    strings, tuples of ints, and None of each."""
    if isinstance(hint, types.UnionType):
        (hint,) = (member for member in typing.get_args(hint) if member is not types.NoneType)
    if hint is bool:
        return bool, ""
    if hint is int:
        return int, "N"
    if hint is float:
        return float, "X"
    if typing.get_origin(hint) is tuple:
        return integers, "N,N"
    if hint is str or typing.get_origin(hint) is typing.Literal:
        return str, "NAME"
    raise TypeError(f"no flag can be made of a field of type {hint}")


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def integers(text: str) -> tuple[int, ...]:
    """`4,2` as (4, 2)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"integers with commas are needed, as 4,2; got {text!r}"
        ) from None
