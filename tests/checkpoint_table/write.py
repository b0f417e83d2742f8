"""Child of the table: writes every folder of one megatron-core release, that of PYTHONPATH.

python -m checkpoint_table.write ROOT
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import harness
from dist.checkpoint import checkpoint_kinds

from checkpoint_table import cells


def release(rank: int) -> str:
    import megatron.core

    return megatron.core.__version__.split("+")[0]


def write_all(root: Path) -> None:
    """Write below `root`: folders, the oracle's `logits.pt`, and last `release.txt`."""
    import torch

    root.mkdir(parents=True)
    by_ranks = sorted(cells.places(), key=lambda place: place[2].ranks)
    logits = {
        name: harness.run_ranks(
            checkpoint_kinds.write_settings,
            1,
            root / cells.settings_folder(name),
            cells.arguments(name),
            cells.prompts(),
        )[0]
        for name in cells.SETTINGS
    }
    torch.save(logits, root / "logits.pt")
    # The oracle has changed Megatron's globals.
    harness.close_pools()
    for _, kind, shape, folder in by_ranks:
        harness.run_ranks(
            getattr(importlib.import_module(kind.module), kind.function),
            shape.ranks,
            root / folder,
            cells.MODEL,
            shape.tp,
            shape.pp,
            shape.vpp,
            std=cells.STD,
            **kind.options,
        )
    (found,) = harness.run_ranks(release, 1)
    (root / "release.txt").write_text(found)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
    harness.close_pools()
