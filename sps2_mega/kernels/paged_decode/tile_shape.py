"""What the paged decode kernel is compiled for, by head width and type: constants, no tuning at run
time."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TileShape:
    """`heads` query heads (padded) of `width` elements (padded) against `tokens` at a time;
    pipeline `stages`. `precision` is how float32 is multiplied; other types have one way only."""

    heads: int
    width: int
    tokens: int
    precision: str
    warps: int = 4
    stages: int = 3


def tile_shape(width: int, heads_per_group: int, dtype: torch.dtype) -> TileShape:
    """So many tokens that a few programs together keep a multiprocessor's reads in flight, and, in
    exact float32, no more than registers hold."""
    exact = dtype == torch.float32
    padded = _power_of_two(width)
    return TileShape(
        heads=_power_of_two(heads_per_group),
        width=padded,
        tokens=max(16, min(64, (2048 if exact else 8192) // padded)),
        precision="ieee" if exact else "tf32",
    )


def _power_of_two(size: int) -> int:
    """The smallest one that the matrix units can take."""
    return max(16, 1 << (size - 1).bit_length())
