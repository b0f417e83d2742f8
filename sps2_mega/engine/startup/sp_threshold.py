"""Default of `--sp-threshold`: the prompt length below which one SP rank beats all together.

A pure function of the model and of the measured machine. It compares one prompt, alone in its step.
With one prompt for each rank nothing travels and all ranks are busy, so longer ones too are better
off whole, until unequal lengths cost more than communication: by rule of thumb up to `CROWD` times
as long.
"""

from __future__ import annotations

from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.planner.exact import choose
from sps2_mega.attention.planner.step_planner import PrefillPlanner
from sps2_mega.attention.planner.step_shape import step_shape
from sps2_mega.kv_cache.placement import prompt_block_ranks
from sps2_mega.scheduler.layer_flops import LayerFlops

CROWD = 8
_LONGEST = 2**15  # tokens: a longer prompt is spread, whatever the links


def auto_threshold(
    planner: PrefillPlanner, layer_flops: LayerFlops, *, block_size: int, sp_size: int, tp_size: int
) -> int:
    """Least power-of-two number of blocks, in tokens, at which all ranks together beat one."""
    num_blocks = sp_size
    while num_blocks * block_size < _LONGEST:
        if _all_ranks_s(
            planner, layer_flops, num_blocks, block_size, sp_size, tp_size
        ) < _one_rank_s(planner, layer_flops, num_blocks * block_size, tp_size):
            break
        num_blocks *= 2
    return num_blocks * block_size


def _one_rank_s(
    planner: PrefillPlanner, layer_flops: LayerFlops, num_tokens: int, tp_size: int
) -> float:
    """Seconds of one layer on one rank, at the measured speed of attention."""
    return layer_flops.flops(0, num_tokens) / tp_size / planner.machine.flops_per_s


def _all_ranks_s(
    planner: PrefillPlanner,
    layer_flops: LayerFlops,
    num_blocks: int,
    block_size: int,
    sp_size: int,
    tp_size: int,
) -> float:
    """Seconds of one layer on all ranks: the planner's attention, the rest in equal shares."""
    ranks = prompt_block_ranks(num_blocks, [num_blocks] * sp_size, "zigzag")
    assert ranks is not None, "every rank has room for the whole prompt"
    num_tokens = num_blocks * block_size
    shape = step_shape(
        build_layout([ranks], [num_tokens], block_size=block_size, sp_size=sp_size),
        num_heads=planner.num_heads,
        num_kv_heads=planner.num_kv_heads,
        head_dim=planner.head_dim,
        itemsize=planner.itemsize,
        window=planner.window,
    )
    attention = choose(shape, planner.machine, planner.candidates, overlap=planner.overlap)
    linear = num_tokens * layer_flops.token_flops / tp_size / sp_size / planner.machine.flops_per_s
    return attention.estimates[0].seconds + linear
