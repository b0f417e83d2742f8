"""Writer of safetensors files of bounded size with an index; holds one file's tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

FILE_BYTES = 4 << 30
_INDEX = "model.safetensors.index.json"

Group = tuple[str, int]
"""Tensors that are read at once and must stay in one file: name and size in bytes."""


def write_safetensors(
    folder: Path,
    groups: Sequence[Group],
    read: Callable[[str], list[tuple[str, Tensor]]],
    *,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write groups of tensors in order.

    `read(group name)` gives the (name, contiguous tensor) pairs of a group.
    """
    files = plan_files(groups, file_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files, start=1):
        file = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        tensors = dict(pair for name in names for pair in read(name))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plan_files(groups: Sequence[Group], file_bytes: int) -> list[list[str]]:
    """Names per file, in order; a file exceeds `file_bytes` only if one group alone does."""
    files: list[list[str]] = []
    room = 0
    for name, size in groups:
        if not files or size > room:
            files.append([])
            room = file_bytes
        files[-1].append(name)
        room -= size
    return files
