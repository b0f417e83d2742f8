"""Copy of a model folder that admits longer texts: same weights, for measuring time only."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sps2_mega.checkpoint.resolve import resolve_model


def stretched(model: str, context: int, folder: Path) -> str:
    """Folder with the weights and tokenizer of `model` and a context of `context` tokens.

    `model` is a Hugging Face folder or a bundled name; files are linked.
    """
    source = Path(resolve_model(model).path)
    target = folder / source.name
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != "config.json":
            os.symlink(file.resolve(), target / file.name)
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = context
    (target / "config.json").write_text(json.dumps(config))
    return str(target)
