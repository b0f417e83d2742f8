"""Tile sizes of the paged decode kernel, constant for each head width and type."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TileShape:
    """`heads` query heads of `width` elements (both padded) against `tokens` at a time.

    `precision` is the way float32 is multiplied (other types have one way only);
    `warps` and pipeline `stages` are the program's.
    """

    heads: int
    width: int
    tokens: int
    precision: str
    warps: int = 4
    stages: int = 3


def tile_shape(width: int, heads_per_group: int, dtype: torch.dtype) -> TileShape:
    """Tile shape for `heads_per_group` query heads per KV head, of `width` elements.

    Its tokens let a few programs together keep a multiprocessor's reads in flight
    and, in exact float32, fit into registers.
    """
    exact = dtype == torch.float32
    padded = _power_of_two(width)
    return TileShape(
        heads=_power_of_two(heads_per_group),
        width=padded,
        tokens=max(16, min(64, (2048 if exact else 8192) // padded)),
        precision="ieee" if exact else "tf32",
    )


def _power_of_two(size: int) -> int:
    """The next power of two, at least the matrix units' smallest size of 16."""
    return max(16, 1 << (size - 1).bit_length())
