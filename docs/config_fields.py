"""Sphinx directive `config-fields`: a table of the fields of a configuration dataclass.

The argument is the class's dotted name; nested dataclasses of the same module follow with their
path, as `csa.halo`. Defaults, flags and help texts are the declarations' own.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class ConfigFields(SphinxDirective):
    """Table with a row per field: name and flag, default, meaning."""

    required_arguments = 1
    has_content = False

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        rows = list(rows_of(getattr(importlib.import_module(module), name), ""))
        text = [
            "| field, flag | default | meaning |",
            "|---|---|---|",
            *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
        ]
        return self.parse_text_to_nodes("\n".join(text))


def rows_of(config: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Field path with flag, default and meaning, in the order of the declarations."""
    for field in dataclasses.fields(config):
        path = f"{prefix}{field.name}"
        default = _default(field)
        if dataclasses.is_dataclass(default):
            yield from rows_of(type(default), f"{path}.")
            continue
        declared = field.metadata.get("flag") or {}
        told = declared or field.metadata.get("override") or {}
        name = f"`{path}`"
        if declared:
            name += f" `--{declared.get('name') or field.name.replace('_', '-')}`"
        yield name, f"`{default!r}`", told.get("help", "")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("config-fields", ConfigFields)
    return {"parallel_read_safe": True}
