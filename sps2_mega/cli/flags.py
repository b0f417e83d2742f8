"""Command-line flags from config dataclasses, and config dataclasses back from parsed flags.

A field is a flag only if it was declared with `config_fields.flag`; defaults stay in the
dataclasses, so a flag that is not given is not set. Decides nothing about which commands exist.
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
class FieldSpec:
    """A leaf field of a config dataclass: its dotted path, its type, and its flag if it has one.

    `flag` is the flag's name without dashes, `also` its further spellings with them.
    """

    path: str
    flag: str | None
    also: tuple[str, ...]
    help: str
    default: Any
    hint: Any

    @property
    def kind(self) -> Any:
        """The type without None."""
        if not isinstance(self.hint, types.UnionType):
            return self.hint
        (kind,) = (each for each in typing.get_args(self.hint) if each is not types.NoneType)
        return kind

    @property
    def optional(self) -> bool:
        return self.kind is not self.hint

    @property
    def choices(self) -> tuple[str, ...] | None:
        """Allowed values of a Literal, else None."""
        is_literal = typing.get_origin(self.kind) is typing.Literal
        return typing.get_args(self.kind) if is_literal else None

    @property
    def metavar(self) -> str:
        """Placeholder for a value in helps."""
        return _reader(self.kind)[1]

    def read(self, text: str) -> Any:
        """Value of the field from text.

        Raises:
            ValueError, argparse.ArgumentTypeError: the text is no value of this type.
        """
        return _reader(self.kind)[0](text)


def fields_of(config: type, path: tuple[str, ...] = ()) -> Iterator[FieldSpec]:
    """Leaf fields of a dataclass, nested ones included, in order of declaration."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields_of(hints[field.name], (*path, field.name))
            continue
        flag = field.metadata.get("flag")
        given = flag or field.metadata.get("override", {})
        yield FieldSpec(
            path=".".join((*path, field.name)),
            flag=None if flag is None else flag["name"] or field.name.replace("_", "-"),
            also=given.get("also", ()),
            help=given.get("help", ""),
            default=field.default,
            hint=hints[field.name],
        )


def flags_of(config: type) -> dict[str, FieldSpec]:
    """Flags of a dataclass, by name without dashes, in order of declaration."""
    return {spec.flag: spec for spec in fields_of(config) if spec.flag is not None}


def add_flags(parser: argparse._ActionsContainer, config: type) -> None:
    """Add the flags of `config`; what is not given on the command line stays absent."""
    for name, spec in flags_of(config).items():
        add_flag(parser, spec, f"--{name}", *spec.also, help=described(spec).replace("%", "%%"))


def add_flag(
    parser: argparse._ActionsContainer,
    spec: FieldSpec,
    *spellings: str,
    help: str,
    dest: str | None = None,
) -> None:
    """Add a flag that stores a value of the field under `dest` (default: the field's path)."""
    dest = spec.path if dest is None else dest
    if spec.kind is bool:
        parser.add_argument(
            *spellings, dest=dest, action="store_true", default=argparse.SUPPRESS, help=help
        )
        return
    parser.add_argument(
        *spellings,
        dest=dest,
        type=_reader(spec.kind)[0],
        choices=spec.choices,
        default=argparse.SUPPRESS,
        metavar=None if spec.choices else spec.metavar,
        help=help,
    )


def described(spec: FieldSpec) -> str:
    """Help of a field, with its default where that says something."""
    if spec.default is None or spec.kind is bool:
        return spec.help
    return f"{spec.help} (default: {spec.default})"


def config_from(config: type[Config], parsed: argparse.Namespace) -> Config:
    """The dataclass with the values that were given; all others keep their defaults."""
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


def _reader(kind: Any) -> tuple[Callable[[str], Any], str]:
    """Conversion from text, and the placeholder in helps, for a type that a flag can have."""
    if kind is bool:
        return truth, "true|false"
    if kind is int:
        return int, "N"
    if kind is float:
        return float, "X"
    if typing.get_origin(kind) is tuple:
        return integers, "N,N"
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return str, "NAME"
    raise TypeError(f"no flag can be made of a field of type {kind}")


def integers(text: str) -> tuple[int, ...]:
    """`4,2` as (4, 2)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"integers with commas are needed, as 4,2; got {text!r}"
        ) from None


def truth(text: str) -> bool:
    """`true` or `false` as a bool."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false is needed, got {text!r}")
    return text.lower() == "true"
