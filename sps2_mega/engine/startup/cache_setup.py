"""Making this rank's share of the KV cache: as many blocks as its memory holds and all ranks can
have.

Also where this rank's memory then went.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from sps2_mega.checkpoint.sharding import num_query_groups
from sps2_mega.comm.collectives import minimum
from sps2_mega.config import EngineConfig, ModelConfig
from sps2_mega.engine.startup.memory import activation_bytes, decode_rank_bytes, num_kv_blocks
from sps2_mega.engine.startup.memory_table import RankMemory
from sps2_mega.errors import ConfigError
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.mcore.init import Compute
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.launcher import LaunchInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShare:
    """This rank's pool of `num_blocks` blocks. Of memory (bytes): what blocks take, what a step may
    need, and what was free before both."""

    pool: KVPool
    num_blocks: int
    pool_bytes: int
    activation_bytes: int
    free_bytes: int


def allocate_cache(
    config: EngineConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    compute: Compute,
    info: LaunchInfo,
    max_model_len: int,
    transport: str,
    *,
    prefills: bool = True,
) -> CacheShare:
    """The pool; all ranks agree on the number of blocks by the minimum. Ranks that do not prefill
    have small steps, and keys and values of a prompt that come in from others."""
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
    longest_pass = max(config.scheduler.max_prefill_tokens, max_model_len)
    if prefills:
        largest_step = activation_bytes(
            model,
            tp=groups.tp.size,
            sp=sp,
            num_tokens=longest_pass,
            itemsize=compute.dtype.itemsize,
            gathers_keys=transport in ("gather", "auto"),
        )
    else:
        largest_step = decode_rank_bytes(
            model,
            tp=groups.tp.size,
            sp=sp,
            num_decodes=config.scheduler.max_running,
            num_received=longest_pass,
            itemsize=compute.dtype.itemsize,
        )
    num_blocks = num_kv_blocks(
        config.cache,
        bytes_per_block=bytes_per_block,
        free_bytes=free_bytes,
        activation_bytes=largest_step,
        # Sequences are spread over ranks as equally as whole blocks allow; one block each for the
        # rest.
        useful_blocks=config.scheduler.max_running * (-(-blocks_per_sequence // sp) + 1),
    )
    num_blocks = minimum(num_blocks, groups.control)
    pool = KVPool(
        num_layers=model.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=model.head_dim,
        dtype=compute.dtype,
        device=compute.device,
    )
    return CacheShare(
        pool=pool,
        num_blocks=num_blocks,
        pool_bytes=num_blocks * bytes_per_block,
        activation_bytes=largest_step,
        free_bytes=free_bytes,
    )


def rank_memory(cache: CacheShare, weights: Iterable[Tensor]) -> RankMemory:
    """Where this rank's memory went."""
    return RankMemory(
        weights=sum(weight.nbytes for weight in weights),
        kv_cache=cache.pool_bytes,
        activations=cache.activation_bytes,
        free=cache.free_bytes - cache.pool_bytes - cache.activation_bytes,
    )


def _free_bytes(device: torch.device, info: LaunchInfo) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // info.local_world_size
