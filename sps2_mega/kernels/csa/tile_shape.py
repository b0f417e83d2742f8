"""Tile sizes of the strided attention kernel, constant for each head width and type.

A tile of queries holds the query heads of one KV head as extra rows, so `rows` counts (query, head)
pairs. The numbers keep the query tile, the output in float32 and the keys and values being loaded
within registers and shared memory of one multiprocessor. Nothing is tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

_SHARED_BYTES = 160 * 1024  # limit of a program; data-centre cards since Ampere have it


@dataclass(frozen=True, slots=True)
class TileShape:
    """`rows` of queries against `keys` at a time; `warps` and pipeline `stages` of the program."""

    rows: int
    keys: int
    warps: int
    stages: int


def padded_width(width: int) -> int:
    """Head width that a tile is allocated for: the next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def tile_shape(width: int, itemsize: int) -> TileShape:
    """Tile shape for heads of `width` elements of `itemsize` bytes.

    Raises:
        ValueError: heads wider than 256.
    """
    if not 1 <= width <= 256:
        raise ValueError(f"head width {width}: the kernel has tiles for 1 to 256")
    padded = padded_width(width)
    if itemsize == 4:  # exact float32 products have no matrix unit: registers are the limit
        rows, keys = {256: (32, 16), 128: (32, 32)}.get(padded, (64, 32))
        return TileShape(rows=rows, keys=keys, warps=8, stages=2)
    rows, keys = 128, 32 if padded == 256 else 64
    free = _SHARED_BYTES - rows * padded * itemsize
    stages = min(4, free // (2 * keys * padded * itemsize))
    return TileShape(rows=rows, keys=keys, warps=8, stages=stages)


def fits(width: int, itemsize: int, heads_per_group: int) -> bool:
    """Whether the kernel has a tile for this head width and number of query heads per KV head."""
    return 1 <= width <= 256 and heads_per_group <= tile_shape(width, itemsize).rows


def num_parts(num_tiles: int, num_keys: int, num_processors: int) -> int:
    """Number of parts that every tile's keys are divided into, so that few tiles fill the device.

    A part has at least 1024 keys, which keeps the partials small compared with what is read.
    """
    if num_tiles == 0 or num_tiles >= num_processors:
        return 1
    wanted = -(-2 * num_processors // num_tiles)
    return max(1, min(wanted, num_keys // 1024, 32))
