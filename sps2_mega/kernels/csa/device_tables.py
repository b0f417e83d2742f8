"""Tables of the sparse attention kernel on the device, cached per list of pieces."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from sps2_mega.kernels.csa.piece import Piece
from sps2_mega.kernels.csa.tile_shape import num_parts
from sps2_mega.kernels.csa.tiles import plan_tiles
from sps2_mega.kernels.processors import num_processors


@lru_cache(maxsize=64)
def device_tables(
    pieces: tuple[Piece, ...],
    queries: range,
    keys: range,
    num_kv_heads: int,
    tile_queries: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, int]:
    """Tiles and segments on the device, and the number of parts.

    They are made once per plan and used by every layer.
    """
    plan_in = partial(
        plan_tiles,
        pieces,
        queries=queries,
        keys=keys,
        num_kv_heads=num_kv_heads,
        tile_queries=tile_queries,
    )
    plan = plan_in()
    most_keys = max((len(piece.keys) for piece in pieces if not piece.causal), default=0)
    parts = num_parts(len(plan.tiles), most_keys, num_processors(device))
    if parts > 1:
        plan = plan_in(num_parts=parts)
    tiles, segments = (torch.from_numpy(x).to(device) for x in (plan.tiles, plan.segments))
    return tiles, segments, parts
