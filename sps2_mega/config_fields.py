"""Declarations of dataclass fields that users set: by a flag of their own, or by `--override`."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def flag(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    also: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also a command-line flag.

    `name` is the flag's name where it differs from the field's; `also` has further spellings,
    dashes included. The values of a Literal are the flag's choices.
    """
    metadata = {"help": help, "name": name, "also": also}
    return field(default=default, metadata={"flag": metadata})


def unflagged(default: Any, help: str) -> Any:
    """A dataclass field without a flag: set from Python, or by `--override FIELD=VALUE`."""
    return field(default=default, metadata={"override": {"help": help}})
