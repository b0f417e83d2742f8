"""How many KV cache blocks a rank can hold: pure arithmetic on free memory."""

from __future__ import annotations

import logging

from sps2_mega.config import CacheConfig, ModelConfig
from sps2_mega.errors import ConfigError

log = logging.getLogger(__name__)


def activation_bytes(
    model: ModelConfig, *, tp: int, sp: int, num_tokens: int, itemsize: int, gathers_keys: bool
) -> int:
    """Upper estimate of what one layer holds at once on a rank for a step of `num_tokens` tokens:
    residual stream and its norm, q/k/v with their exchange buffers, and the MLP's inner tensors of
    its share; where keys are gathered also K and V of all tokens, in the order they come and in
    sequence order."""
    kv_heads = max(model.num_kv_heads, tp)
    heads = model.num_heads + 2 * kv_heads
    inner = (3 if model.gated else 2) * model.ffn_hidden_size
    width = 4 * model.hidden_size + (3 * heads * model.head_dim + inner) // tp
    gathered = 4 * kv_heads * model.head_dim // tp if gathers_keys and sp > 1 else 0
    return (-(-num_tokens // sp) * width + num_tokens * gathered) * itemsize


def decode_rank_bytes(
    model: ModelConfig, *, tp: int, sp: int, num_decodes: int, num_received: int, itemsize: int
) -> int:
    """The same for a rank that only decodes: a step in which all of `num_decodes` run here, while
    one layer's keys and values of a prompt of `num_received` tokens come in."""
    step = activation_bytes(
        model, tp=tp, sp=1, num_tokens=num_decodes, itemsize=itemsize, gathers_keys=False
    )
    cells = -(-num_received // sp) * (max(model.num_kv_heads, tp) // tp)
    return step + 2 * cells * model.head_dim * itemsize


def num_kv_blocks(
    cache: CacheConfig,
    *,
    bytes_per_block: int,
    free_bytes: int,
    activation_bytes: int,
    useful_blocks: int,
) -> int:
    """Blocks for this rank: as configured, else what the memory holds, but no more than could be
    used.

    Raises:
        ConfigError: not even one block fits.
    """
    if cache.num_blocks is not None:
        if cache.num_blocks < 1:
            raise ConfigError(f"num_gpu_blocks_override must be at least 1, got {cache.num_blocks}")
        return cache.num_blocks
    if not 0.0 < cache.memory_fraction <= 1.0:
        raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {cache.memory_fraction}")
    available = int(free_bytes * cache.memory_fraction) - activation_bytes
    blocks = min(available // bytes_per_block, useful_blocks)
    if blocks < 1:
        raise ConfigError(
            f"no room for a KV cache: {free_bytes / 2**20:.0f} MiB free after loading weights, "
            f"{cache.memory_fraction:.0%} of it may be used, activations need about "
            f"{activation_bytes / 2**20:.0f} MiB, one block needs {bytes_per_block / 2**20:.2f} "
            "MiB. "
            "Raise gpu_memory_utilization, lower max_num_batched_tokens, or use more ranks"
        )
    return blocks
