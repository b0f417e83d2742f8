"""What an engine says of itself between two steps; who shows it, and how, is decided elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.metrics import TokenWaits


@dataclass(frozen=True, slots=True, kw_only=True)
class KVUse:
    """KV cache blocks of each sp rank of a side of the job (`parallel.sides`), those that each has
    and those in use."""

    side: str
    blocks_per_rank: int
    used_per_rank: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot; token counts are cumulative, `kv_usage` is the used share of all blocks in [0,
    1]. Of prompts, `prompt_tokens` were computed and `cached_tokens` found in the cache.
    `prefill_comm` is rank 0's communication in all prefill steps. `kv_sides` are all ranks, or
    those that prefill and those that decode. `last_waits` are those that the last of `num_steps`
    steps ended."""

    num_running: int
    num_waiting: int
    kv_usage: float
    kv_sides: tuple[KVUse, ...]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    prefill_comm: CommSeconds
    num_steps: int
    last_waits: TokenWaits
