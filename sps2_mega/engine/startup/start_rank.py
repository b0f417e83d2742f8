"""From a configuration to a rank that can execute steps: resolve, refuse, join, load, allocate."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sps2_mega.attention.build import PrefillSetup
from sps2_mega.attention.planner.attention_choice import choose_transport, sparse_prefill
from sps2_mega.attention.planner.exact import TRANSPORTS
from sps2_mega.attention.planner.step_planner import PrefillPlanner
from sps2_mega.checkpoint.resolve import ResolvedModel, resolve_model
from sps2_mega.checkpoint.sharding import check_tp, num_query_groups
from sps2_mega.comm.bridge import Bridge
from sps2_mega.comm.rendezvous_facts import tell_rank_zero
from sps2_mega.comm.watchdog import Watchdog
from sps2_mega.config import EngineConfig, ModelConfig
from sps2_mega.engine.startup.cache_setup import allocate_cache, rank_memory
from sps2_mega.engine.startup.load_progress import LoadProgress
from sps2_mega.engine.startup.machine_probe import machine_facts
from sps2_mega.engine.startup.memory_table import RankMemory
from sps2_mega.engine.startup.model_setup import load_model
from sps2_mega.engine.startup.pool_config import pool_config
from sps2_mega.engine.startup.prefill_pipeline import check_pipeline, make_pipeline
from sps2_mega.engine.startup.tracing import TraceFile
from sps2_mega.engine.startup.transport_probe import LayerHeads
from sps2_mega.errors import CheckpointError, ConfigError
from sps2_mega.mcore.init import (
    Compute,
    agree_topology,
    choose_compute,
    initialize,
    open_store,
    refuse,
)
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.launcher import LaunchInfo, cache_folder
from sps2_mega.parallel.rank_pools import RankPool, rank_pool_of, split_rank_pools
from sps2_mega.worker.decode_graphs import make_decode_graphs
from sps2_mega.worker.executor import Executor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRank:
    """A rank that has joined the job, with its weights and its share of the KV cache. `memory` is
    that of all ranks on rank 0, else empty. `config` is that of its side, with what the model's
    file suggests filled in. `sides` are all of the job; `bridge` is between them, where there are
    two."""

    config: EngineConfig
    resolved: ResolvedModel
    sides: tuple[RankPool, ...]
    side: RankPool
    bridge: Bridge | None
    groups: ParallelGroups
    watchdog: Watchdog
    executor: Executor
    trace: TraceFile | None
    num_blocks: int
    memory: tuple[RankMemory, ...]
    compute: Compute
    sp_levels: tuple[int, ...]
    max_model_len: int
    transport: str


def start_rank(
    config: EngineConfig,
    info: LaunchInfo,
    *,
    show_progress: bool,
    on_stage: Callable[[str], None] | None = None,
) -> StartedRank:
    """Runs on every rank; what can be refused is refused before the first collective. `on_stage`
    hears on rank 0 what the start is at.

    Raises:
        ConfigError, CheckpointError: the same on every rank, where it follows from shared facts.
    """
    began = time.monotonic()
    progress = LoadProgress(show=show_progress, on_stage=on_stage)
    parallel = config.parallel
    sides = split_rank_pools(parallel, info.world_size)
    side = rank_pool_of(sides, info.rank)
    try:
        checked = _check_on_this_rank(pool_config(config, side), info)
    except (ConfigError, CheckpointError) as error:
        if info.world_size > 1:
            refuse(info, str(error))
        raise
    resolved, compute, transport = checked.resolved, checked.compute, checked.transport
    model, max_model_len, config = resolved.config, checked.max_model_len, checked.config
    if info.world_size > 1:
        others = info.world_size - 1
        progress.stage(f"waiting for {others} other rank{'s' if others > 1 else ''}")
    store = open_store(info)
    topology = agree_topology(store, info, parallel)
    tp_rank, _ = topology.coordinates(info.rank - side.first)
    sparse = sparse_prefill(config, model, topology, transport, tp_rank=tp_rank)
    watchdog = Watchdog.start(
        info,
        publish=lambda address: store.set("sps2/watchdog", address),
        lookup=lambda: store.get("sps2/watchdog").decode(),
        step_timeout=config.step_timeout,
    )
    with failing(watchdog):
        groups = initialize(
            store,
            info,
            topology,
            device=compute.device,
            timeout_s=config.step_timeout,
            side=side,
        )
        bridge = Bridge.open(store, info.rank, info.world_size) if len(sides) > 1 else None
        pipeline, trace = make_pipeline(config, groups, compute.device)
        joined = time.monotonic()
        gpt = load_model(config.load_format, resolved, groups, compute, progress)
        loaded = time.monotonic()
        progress.stage("allocating the KV cache")
        cache = allocate_cache(
            config,
            model,
            groups,
            compute,
            info,
            max_model_len,
            transport,
            prefills=side.name != "decode",
        )
        num_blocks = cache.num_blocks
        planner = None
        if transport == "auto":
            progress.stage("preparing the choice of transports")
            planner = _prefill_planner(config, model, groups, compute, info)
        if groups.global_rank == 0:
            log.info(
                "%s: %s ranks (tp=%d sp=%d levels=%s) on %s in %s; joined in %.1f s, weights in "
                "%.1f s, "
                "KV cache of %d tokens",
                resolved.name,
                side.size if side.name == "all" else f"{side.size} {side.name}",
                topology.tp,
                topology.sp,
                "x".join(map(str, topology.sp_levels)),
                compute.device.type,
                str(compute.dtype).removeprefix("torch."),
                joined - began,
                loaded - joined,
                num_blocks * config.cache.block_size * topology.sp,
            )
        memory = tell_rank_zero(
            store,
            "memory",
            rank_memory(cache, gpt.weights().values()).encode(),
            rank=info.rank,
            world_size=info.world_size,
        )
    executor = Executor(
        gpt,
        model,
        cache.pool,
        groups,
        prefill=PrefillSetup(
            transport=transport, sparse=sparse, planner=planner, pipeline=pipeline
        ),
        sparse_decode=config.decode_attention == "csa",
        graphs=make_decode_graphs(config, gpt, cache.pool, groups, compute.device),
        dtype=compute.dtype,
        device=compute.device,
    )
    watchdog.wait_for_work()
    return StartedRank(
        config=config,
        resolved=resolved,
        sides=sides,
        side=side,
        bridge=bridge,
        groups=groups,
        watchdog=watchdog,
        executor=executor,
        trace=trace,
        num_blocks=num_blocks,
        memory=tuple(map(RankMemory.decode, memory)),
        compute=compute,
        sp_levels=tuple(topology.sp_levels),
        max_model_len=max_model_len,
        transport=transport,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    config: EngineConfig
    resolved: ResolvedModel
    compute: Compute
    transport: str
    max_model_len: int


def _check_on_this_rank(config: EngineConfig, info: LaunchInfo) -> _Checked:
    """Everything that can be refused without other ranks."""
    resolved = resolve_model(
        config.model, tokenizer=config.tokenizer, needs_weights=config.load_format != "dummy"
    )
    config = config.replace(csa=config.csa.over(resolved.csa))
    check_tp(resolved.config, config.parallel.tp)
    check_pipeline(config, info.rank)
    transport = choose_transport(
        config.transport, config.csa, resolved.config, sp=config.parallel.sp
    )
    max_model_len = resolve_max_model_len(config.max_model_len, resolved.config)
    compute = choose_compute(config.device, config.dtype, resolved.config.dtype, info.local_rank)
    if compute.device.type == "cpu":
        torch.set_num_threads(config.threads or _threads_per_rank(info))
    return _Checked(
        config=config,
        resolved=resolved,
        compute=compute,
        transport=transport,
        max_model_len=max_model_len,
    )


def _prefill_planner(
    config: EngineConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    compute: Compute,
    info: LaunchInfo,
) -> PrefillPlanner:
    """All ranks call it together: the machine may have to be measured."""
    tp = groups.tp.size
    heads = LayerHeads(
        num_heads=model.num_heads // tp,
        num_kv_heads=num_query_groups(model, tp) // tp,
        head_dim=model.head_dim,
        dtype=compute.dtype,
    )
    machine = machine_facts(
        groups,
        heads,
        device=compute.device,
        network=info.master_addr,
        folder=cache_folder(),
    )
    return PrefillPlanner(
        machine=machine,
        candidates=TRANSPORTS,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        itemsize=heads.dtype.itemsize,
        window=model.sliding_window,
        overlap=config.pipeline != "off",
        log_choices=groups.global_rank == 0,
    )


def resolve_max_model_len(asked: int | None, model: ModelConfig) -> int:
    """Longest prompt plus output. Raises ConfigError where learned positions end earlier."""
    if asked is None:
        return model.max_position_embeddings
    if asked < 1:
        raise ConfigError(f"max_model_len must be at least 1, got {asked}")
    if asked > model.max_position_embeddings:
        if model.rope is None:
            raise ConfigError(
                f"max_model_len={asked} exceeds the model's {model.max_position_embeddings} "
                "learned positions"
            )
        log.warning(
            "max_model_len=%d exceeds the model's trained context of %d tokens: quality is not "
            "assured",
            asked,
            model.max_position_embeddings,
        )
    return asked


@contextmanager
def failing(watchdog: Watchdog) -> Iterator[None]:
    """An exception inside ends the whole job, not only this rank."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  a rank's edge: told to all ranks, never swallowed
        watchdog.fail(error)


def _threads_per_rank(info: LaunchInfo) -> int:
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // info.local_world_size)
