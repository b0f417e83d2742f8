"""`sps2 inspect`: format, architecture, size and saved layout of a checkpoint, from headers only.

    sps2 inspect DIR [--tokenizer DIR] [--json]

Exit code 1 when the folder cannot be read, or does not hold exactly the model that it states.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sps2_mega.cli.tokenizer_report import tokenizer_facts, tokenizer_line


def main(argv: Sequence[str] | None = None, *, prog: str = "sps2 inspect") -> int:
    """Print the facts of one checkpoint folder."""
    parser = argparse.ArgumentParser(prog=prog, description="Say what a checkpoint folder holds.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer (default: the checkpoint's own)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)

    from sps2_mega.errors import CheckpointError, ConfigError

    try:
        facts = inspect(args.folder, args.tokenizer)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2) if args.json else _table(facts))
    return 0 if facts["complete"] else 2


def inspect(folder: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """Facts of a checkpoint as plain values, from headers and no weights.

    `tokenizer` is a folder that replaces the checkpoint's own tokenizer.

    Raises:
        CheckpointError: the folder is no checkpoint that can be read.
        ConfigError: its architecture is not stated or cannot be run.
    """
    from sps2_mega.checkpoint.architecture import model_config_to_mapping
    from sps2_mega.checkpoint.inventory import check_complete
    from sps2_mega.checkpoint.sharding import num_parameters
    from sps2_mega.checkpoint.source import open_checkpoint, tokenizer_folder
    from sps2_mega.errors import CheckpointError

    tokens = tokenizer or tokenizer_folder(folder)
    source = open_checkpoint(folder, tokens=tokens)
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
    }


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
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
