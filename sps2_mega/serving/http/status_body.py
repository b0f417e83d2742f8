"""Body of `/status`: the content of the page at `/` as one JSON object.

It holds numbers only, no texts of requests.
"""

from __future__ import annotations

import pydantic

from sps2_mega.metrics import DurationHistogram
from sps2_mega.serving.http.async_engine import AsyncEngine, ServedFacts
from sps2_mega.serving.http.recent_waits import WINDOW_S

_MAX_REQUESTS = 50  # rows of a page


class Memory(pydantic.BaseModel):
    """Bytes on one rank; `activations` is an upper estimate for the largest step."""

    weights: int
    kv_cache: int
    activations: int
    free: int


class PoolLayout(pydantic.BaseModel):
    """Ranks with one role: `all`, or `prefill` and `decode` separately."""

    name: str
    tp: int
    sp: int


class Layout(pydantic.BaseModel):
    """Configuration of the loaded engine.

    Levels and transport are those of the first pool; `sp_levels` are sizes of the SP levels,
    innermost first. `memory` has one entry per rank, those of the first pool first.
    """

    world_size: int
    sides: list[PoolLayout]
    sp_levels: list[int]
    device: str
    dtype: str
    transport: str
    max_model_len: int
    memory: list[Memory]


class PoolKVCache(pydantic.BaseModel):
    """Blocks per SP rank of a pool, and the number in use on each."""

    name: str
    blocks_per_rank: int
    used_per_rank: list[int]


class KVCache(pydantic.BaseModel):
    """KV cache in blocks of `block_size` tokens; `sides` are in the order of the layout."""

    block_size: int
    sides: list[PoolKVCache]


class Load(pydantic.BaseModel):
    """Samples now in the engine, and tokens since the start."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Waits(pydantic.BaseModel):
    """Percentiles in seconds; null while there are none."""

    count: int
    p50_s: float | None
    p99_s: float | None


class Latency(pydantic.BaseModel):
    """Waits for tokens that ended within the last `window_s` seconds."""

    window_s: float
    ttft: Waits
    tbt: Waits


class OpenRequest(pydantic.BaseModel):
    """One unanswered request; `output_tokens` is known for streams only."""

    age_s: float
    prompt_tokens: int
    num_samples: int
    stream: bool
    output_tokens: int | None


class StatusBody(pydantic.BaseModel):
    """State of the server.

    `stage` is the current stage of a loading server, `reason` the failure of a failed one.
    `requests` are the oldest of `open_requests`.
    """

    state: str
    stage: str | None
    reason: str | None
    model: str
    version: str
    uptime_s: float
    layout: Layout | None
    kv_cache: KVCache | None
    load: Load
    latency: Latency
    open_requests: int
    requests: list[OpenRequest]


def status_of(
    async_engine: AsyncEngine, *, model: str, version: str, uptime_s: float
) -> StatusBody:
    """Status body in any state of the server; call it in the event loop's thread."""
    facts = None if async_engine.served is None else async_engine.served.facts
    ttft, tbt = async_engine.recent_waits.histograms()
    return StatusBody(
        state=async_engine.state.value,
        stage=async_engine.stage,
        reason=async_engine.reason,
        model=model,
        version=version,
        uptime_s=uptime_s,
        layout=None if facts is None else _layout(facts),
        kv_cache=None if facts is None else _kv_cache(async_engine, facts),
        load=_load(async_engine),
        latency=Latency(window_s=WINDOW_S, ttft=_waits(ttft), tbt=_waits(tbt)),
        open_requests=async_engine.num_open,
        requests=[
            OpenRequest(
                age_s=call.age_s,
                prompt_tokens=sum(map(len, call.prompts)),
                num_samples=call.num_samples,
                stream=call.stream,
                output_tokens=call.streamed_tokens if call.stream else None,
            )
            for call in async_engine.oldest_calls(_MAX_REQUESTS)
        ],
    )


def _layout(facts: ServedFacts) -> Layout:
    return Layout(
        world_size=facts.world_size,
        sides=[PoolLayout(name=pool.name, tp=pool.tp, sp=pool.sp) for pool in facts.pools],
        sp_levels=list(facts.sp_levels),
        device=facts.device,
        dtype=facts.dtype,
        transport=facts.transport,
        max_model_len=facts.max_model_len,
        memory=[
            Memory(
                weights=rank.weights,
                kv_cache=rank.kv_cache,
                activations=rank.activations,
                free=rank.free,
            )
            for rank in facts.memory
        ],
    )


def _kv_cache(async_engine: AsyncEngine, facts: ServedFacts) -> KVCache:
    pools = facts.kv_pools if async_engine.stats is None else async_engine.stats.kv_pools
    return KVCache(
        block_size=facts.block_size,
        sides=[
            PoolKVCache(
                name=use.pool,
                blocks_per_rank=use.blocks_per_rank,
                used_per_rank=list(use.used_per_rank),
            )
            for use in pools
        ],
    )


def _load(async_engine: AsyncEngine) -> Load:
    stats = async_engine.stats
    if stats is None:
        return Load()
    return Load(
        running=stats.num_running,
        waiting=stats.num_waiting,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        output_tokens=stats.output_tokens,
    )


def _waits(histogram: DurationHistogram) -> Waits:
    return Waits(
        count=histogram.count,
        p50_s=histogram.percentile(50),
        p99_s=histogram.percentile(99),
    )
