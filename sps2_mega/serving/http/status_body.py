"""The body of `/status`: what the page at `/` shows, in one JSON object. Numbers only, no texts of
requests."""

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
    """Ranks that do the same: `all`, or those of `prefill` and of `decode`."""

    name: str
    tp: int
    sp: int


class Layout(pydantic.BaseModel):
    """What runs, once it is loaded. Levels and transport are those of the first side; `sp_levels`
    are sizes of the SP levels, innermost first. `memory` is of each rank, those of the first side
    first."""

    world_size: int
    sides: list[PoolLayout]
    sp_levels: list[int]
    device: str
    dtype: str
    transport: str
    max_model_len: int
    memory: list[Memory]


class PoolKVCache(pydantic.BaseModel):
    """Blocks of a side's SP ranks: how many each has, and has in use."""

    name: str
    blocks_per_rank: int
    used_per_rank: list[int]


class KVCache(pydantic.BaseModel):
    """In blocks of `block_size` tokens, side by side as in the layout."""

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
    """Seconds; null while there are none."""

    count: int
    p50_s: float | None
    p99_s: float | None


class Latency(pydantic.BaseModel):
    """Waits for tokens that ended within the last `window_s` seconds."""

    window_s: float
    ttft: Waits
    tbt: Waits


class OpenRequest(pydantic.BaseModel):
    """One request that is not answered yet; `output_tokens` are told for streams only."""

    age_s: float
    prompt_tokens: int
    num_samples: int
    stream: bool
    output_tokens: int | None


class StatusBody(pydantic.BaseModel):
    """`stage` says what a loading server is at, `reason` why one has failed. `requests` are the
    oldest ones of `open_requests`."""

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
    """The state of a server in all its states; to be called in the event loop's thread."""
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
        sides=[PoolLayout(name=side.name, tp=side.tp, sp=side.sp) for side in facts.sides],
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
    sides = facts.kv_sides if async_engine.stats is None else async_engine.stats.kv_pools
    return KVCache(
        block_size=facts.block_size,
        sides=[
            PoolKVCache(
                name=side.pool,
                blocks_per_rank=side.blocks_per_rank,
                used_per_rank=list(side.used_per_rank),
            )
            for side in sides
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
