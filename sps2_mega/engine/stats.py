"""Figures of an engine between two steps; how they are shown is decided elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.metrics import TokenWaits


@dataclass(frozen=True, slots=True, kw_only=True)
class KVUse:
    """KV cache blocks of each SP rank of a pool (`parallel.rank_pools`): all, and those in use."""

    pool: str
    blocks_per_rank: int
    used_per_rank: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Snapshot of an engine.

    Token counts are cumulative: `prompt_tokens` were computed, `cached_tokens` were found in the
    cache. `kv_usage` is the used share of all blocks in [0, 1]; `kv_pools` has one entry per rank
    pool, one or two. `prefill_comm` is rank 0's communication in all prefill steps. `num_steps`
    counts the steps that sampled a token; `last_waits` are the waits that the last of them ended.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    kv_pools: tuple[KVUse, ...]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    prefill_comm: CommSeconds
    num_steps: int
    last_waits: TokenWaits
