"""`sps2 inspect`: format, architecture, size and saved layout of a checkpoint, from headers only.

    sps2 inspect DIR [--config NAME|FILE] [--tokenizer DIR] [--json]

Of a Megatron checkpoint it also lists the settings of the training run that say something about the
model, with what becomes of each; of one that is refused it lists these alone. Exit code 2 when the
folder cannot be read, or does not hold exactly the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sps2_mega.cli.tokenizer_report import tokenizer_facts, tokenizer_line

_VALUE_WIDTH = 40


def main(argv: Sequence[str] | None = None, *, prog: str = "sps2 inspect") -> int:
    """Print the facts of one checkpoint folder."""
    parser = argparse.ArgumentParser(prog=prog, description="Say what a checkpoint folder holds.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="architecture in place of the one that the folder states: a name in model_configs/, "
        "or a file (YAML as there, or a config.json)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)

    from sps2_mega.errors import CheckpointError, ConfigError

    try:
        facts = inspect(args.folder, args.tokenizer, args.config)
    except (CheckpointError, ConfigError) as error:
        settings = [] if args.config else settings_of(args.folder)
        if args.json and settings:
            print(json.dumps({"problem": str(error), "settings": settings}, indent=2))
        elif settings:
            print(_settings_table(settings))
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2) if args.json else _table(facts))
    return 0 if facts["complete"] else 2


def inspect(
    folder: Path, tokenizer: Path | None = None, config: str | None = None
) -> dict[str, Any]:
    """Facts of a checkpoint as plain values, from headers and no weights.

    `tokenizer` is a folder that replaces the checkpoint's own tokenizer, `config` a name or a file
    that replaces its architecture (`given_config`).

    Raises:
        CheckpointError: the folder is no checkpoint that can be read.
        ConfigError: its architecture is not stated or cannot be run.
    """
    from sps2_mega.checkpoint.architecture import model_config_to_mapping
    from sps2_mega.checkpoint.given_config import given_config
    from sps2_mega.checkpoint.inventory import check_complete
    from sps2_mega.checkpoint.sharding import num_parameters
    from sps2_mega.checkpoint.source import open_checkpoint, tokenizer_folder
    from sps2_mega.errors import CheckpointError

    tokens = tokenizer or tokenizer_folder(folder)
    given = None if config is None else given_config(config)
    source = open_checkpoint(folder, given, tokens=tokens)
    problem = None
    try:
        check_complete(source, source.config)
    except CheckpointError as error:
        problem = str(error)
    layout = source.saved_layout
    return {
        "path": str(source.path),
        "format": source.format,
        "iteration": source.iteration,
        "dtype": source.dtype,
        "parameters": num_parameters(source.config),
        "tensors": len(source.shapes()),
        "saved_layout": None if layout is None else {"tp": layout[0], "pp": layout[1]},
        "tokenizer": None if tokens is None else tokenizer_facts(tokens),
        "complete": problem is None,
        "problem": problem,
        "architecture": model_config_to_mapping(source.config),
        "settings": [] if config is not None else settings_of(folder),
    }


def settings_of(folder: Path) -> list[dict[str, str]]:
    """Name, value and treatment of each setting of a Megatron run that is not off or default.

    The treatment begins with `run`, `harmless` or `refused`. Empty where none can be read.
    """
    from sps2_mega.checkpoint.megatron.settings.table import short, treated_settings
    from sps2_mega.checkpoint.source import stored_settings
    from sps2_mega.errors import CheckpointError, ConfigError

    try:
        treated = treated_settings(stored_settings(folder))
    except (CheckpointError, ConfigError):
        return []
    return [
        {"name": name, "value": short(value, _VALUE_WIDTH), "treatment": treatment}
        for name, value, treatment in treated
    ]


def _table(facts: dict[str, Any]) -> str:
    layout = facts["saved_layout"]
    rows = {
        "path": facts["path"],
        "format": facts["format"],
        "iteration": "-" if facts["iteration"] is None else facts["iteration"],
        "dtype": facts["dtype"],
        "parameters": f"{facts['parameters']:,}",
        "tensors": facts["tensors"],
        "saved with": "-" if layout is None else f"TP {layout['tp']}, PP {layout['pp']}",
        "tokenizer": tokenizer_line(facts["tokenizer"]) if facts["tokenizer"] else "no",
        "complete": "yes" if facts["complete"] else facts["problem"],
    }
    if facts["tokenizer"] and facts["tokenizer"]["differs"]:
        rows["note"] = facts["tokenizer"]["differs"]
    rows |= {f"  {name}": value for name, value in facts["architecture"].items()}
    width = max(map(len, rows))
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
    return f"{text}\n\n{_settings_table(facts['settings'])}" if facts["settings"] else text


def _settings_table(settings: list[dict[str, str]]) -> str:
    name, value = (max(len(row[column]) for row in settings) for column in ("name", "value"))
    lines = [
        f"  {row['name']:<{name}}  {row['value']:<{value}}  {row['treatment']}" for row in settings
    ]
    return "\n".join(["settings of the training run, and what becomes of them", *lines])
