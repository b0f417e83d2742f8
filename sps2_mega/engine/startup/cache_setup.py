"""Allocate this rank's share of the KV cache: as many blocks as fit on every rank.

Memory is estimated by pure functions of model and step sizes; free memory is measured here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from sps2_mega.checkpoint.sharding import num_query_groups
from sps2_mega.config import CacheConfig, EngineConfig, ModelConfig
from sps2_mega.engine.startup.memory_table import RankMemory
from sps2_mega.errors import ConfigError
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.mcore.init import Compute
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.launcher import LaunchInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShare:
    """This rank's pool of `num_blocks` blocks, and the memory around it in bytes.

    `pool_bytes` are taken by blocks, `activation_bytes` are what the largest step may need,
    `free_bytes` were free before both.
    """

    pool: KVPool
    num_blocks: int
    pool_bytes: int
    activation_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """Blocks that this rank could hold; bytes of one, of the largest step, and free before both."""

    num_blocks: int
    bytes_per_block: int
    activation_bytes: int
    free_bytes: int


def size_cache(
    config: EngineConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    compute: Compute,
    info: LaunchInfo,
    max_model_len: int,
    transport: str,
    *,
    prefills: bool = True,
) -> CacheSize:
    """Size of this rank's share by what is free here; nothing is allocated, no rank is waited for.

    Args:
        config: of this rank's pool.
        model: its dimensions decide the bytes of a block.
        groups: of this rank.
        compute: device and dtype of the cache.
        info: tells how many ranks share the host's memory.
        max_model_len: longest prompt plus output, in tokens.
        transport: of prefill attention; some gather all keys.
        prefills: False where ranks only decode: their steps are small, and prompts' keys arrive.

    Raises:
        ConfigError: not even one block fits.
    """
    block_size, sp = config.cache.block_size, groups.sp.size
    if block_size < 1:
        raise ConfigError(f"block_size must be at least 1, got {block_size}")
    num_kv_heads = num_query_groups(model, groups.tp.size) // groups.tp.size
    bytes_per_block = KVPool.bytes_per_block(
        num_layers=model.num_layers,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=model.head_dim,
        dtype=compute.dtype,
    )
    blocks_per_sequence = -(-max_model_len // block_size)
    free_bytes = _free_bytes(compute.device, info)
    largest_step = _largest_step_bytes(
        config, model, groups, compute, max_model_len, transport, prefills=prefills
    )
    num_blocks = num_kv_blocks(
        config.cache,
        bytes_per_block=bytes_per_block,
        free_bytes=free_bytes,
        activation_bytes=largest_step,
        # Sequences are spread over ranks evenly in whole blocks: at most one more on a rank.
        useful_blocks=config.scheduler.max_running * (-(-blocks_per_sequence // sp) + 1),
    )
    return CacheSize(
        num_blocks=num_blocks,
        bytes_per_block=bytes_per_block,
        activation_bytes=largest_step,
        free_bytes=free_bytes,
    )


def allocate_cache(
    size: CacheSize,
    config: EngineConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    compute: Compute,
    num_blocks: int,
) -> CacheShare:
    """Allocate the pool of `num_blocks` blocks, which is the smallest size of all ranks."""
    pool = KVPool(
        num_layers=model.num_layers,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        num_kv_heads=num_query_groups(model, groups.tp.size) // groups.tp.size,
        head_dim=model.head_dim,
        dtype=compute.dtype,
        device=compute.device,
    )
    return CacheShare(
        pool=pool,
        num_blocks=num_blocks,
        pool_bytes=num_blocks * size.bytes_per_block,
        activation_bytes=size.activation_bytes,
        free_bytes=size.free_bytes,
    )


def rank_memory(cache: CacheShare, weights: Iterable[Tensor]) -> RankMemory:
    """Memory of this rank by use, in bytes; `weights` are the model's parameters."""
    return RankMemory(
        weights=sum(weight.nbytes for weight in weights),
        kv_cache=cache.pool_bytes,
        activations=cache.activation_bytes,
        free=cache.free_bytes - cache.pool_bytes - cache.activation_bytes,
    )


def activation_bytes(
    model: ModelConfig, *, tp: int, sp: int, num_tokens: int, itemsize: int, gathers_keys: bool
) -> int:
    """Upper estimate of what one layer holds at once on a rank for a step of `num_tokens` tokens.

    Counted are the residual stream and its norm, q/k/v with their exchange buffers, and the inner
    tensors of this rank's share of the MLP; where keys are gathered also K and V of all tokens, in
    the order they arrive and in sequence order.
    """
    kv_heads = max(model.num_kv_heads, tp)
    heads = model.num_heads + 2 * kv_heads
    inner = (3 if model.gated else 2) * model.ffn_hidden_size
    width = 4 * model.hidden_size + (3 * heads * model.head_dim + inner) // tp
    gathered = 4 * kv_heads * model.head_dim // tp if gathers_keys and sp > 1 else 0
    return (-(-num_tokens // sp) * width + num_tokens * gathered) * itemsize


def decode_rank_bytes(
    model: ModelConfig, *, tp: int, sp: int, num_decodes: int, num_received: int, itemsize: int
) -> int:
    """Upper estimate for a rank that only decodes.

    All of `num_decodes` sequences run here in one step, while one layer's keys and values of a
    prompt of `num_received` tokens arrive.
    """
    step = activation_bytes(
        model, tp=tp, sp=1, num_tokens=num_decodes, itemsize=itemsize, gathers_keys=False
    )
    rows = -(-num_received // sp) * (max(model.num_kv_heads, tp) // tp)
    return step + 2 * rows * model.head_dim * itemsize


def num_kv_blocks(
    cache: CacheConfig,
    *,
    bytes_per_block: int,
    free_bytes: int,
    activation_bytes: int,
    useful_blocks: int,
) -> int:
    """Blocks for this rank: as configured, else what its memory holds, at most `useful_blocks`.

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


def _largest_step_bytes(
    config: EngineConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    compute: Compute,
    max_model_len: int,
    transport: str,
    *,
    prefills: bool,
) -> int:
    longest_pass = max(config.scheduler.max_prefill_tokens, max_model_len)
    if prefills:
        return activation_bytes(
            model,
            tp=groups.tp.size,
            sp=groups.sp.size,
            num_tokens=longest_pass,
            itemsize=compute.dtype.itemsize,
            gathers_keys=transport in ("gather", "auto"),
        )
    return decode_rank_bytes(
        model,
        tp=groups.tp.size,
        sp=groups.sp.size,
        num_decodes=config.scheduler.max_running,
        num_received=longest_pass,
        itemsize=compute.dtype.itemsize,
    )


def _free_bytes(device: torch.device, info: LaunchInfo) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // info.local_world_size
