"""Start a rank: check and refuse, join the job, load, allocate, report.

check_rank      this rank alone          (`rank_checks`)
meet, join      all ranks                (`join`)
load, allocate  weights, KV cache, attention
report          memory of all ranks, one log line
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sps2_mega.attention.build import PrefillSetup
from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.attention.planner.attention_choice import sparse_prefill
from sps2_mega.checkpoint.resolve import ResolvedModel
from sps2_mega.comm.bridge import Bridge
from sps2_mega.comm.collectives import minimum
from sps2_mega.comm.rendezvous_facts import tell_rank_zero
from sps2_mega.comm.watchdog import Watchdog
from sps2_mega.config import EngineConfig
from sps2_mega.engine.failing import failing
from sps2_mega.engine.startup.agreement import agreeing
from sps2_mega.engine.startup.attention_setup import make_pipeline, make_planner
from sps2_mega.engine.startup.cache_setup import CacheShare, allocate_cache, rank_memory, size_cache
from sps2_mega.engine.startup.join import Joined, Meeting, join, meet
from sps2_mega.engine.startup.load_progress import LoadProgress
from sps2_mega.engine.startup.memory_table import RankMemory
from sps2_mega.engine.startup.model_setup import load_model
from sps2_mega.engine.startup.placement_probe import measure_placement
from sps2_mega.engine.startup.pool_config import pool_config
from sps2_mega.engine.startup.rank_checks import CheckedRank, check_rank
from sps2_mega.engine.startup.tracing import TraceFile
from sps2_mega.errors import CheckpointError, ConfigError, Refused
from sps2_mega.mcore.init import Compute, finalize, refuse
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.parallel.rank_pools import RankPool, rank_pool_of, split_rank_pools
from sps2_mega.worker.decode_graphs import make_decode_graphs
from sps2_mega.worker.executor import Executor

if TYPE_CHECKING:
    from torch.distributed import Store

    from sps2_mega.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRank:
    """A rank that has joined the job, with its weights and its share of the KV cache.

    `config` is that of its pool, with what the model's file suggests filled in. `pools` are all of
    the job; `bridge` connects them, where there are two. `memory` is that of all ranks on rank 0,
    else empty. `num_blocks` is per SP rank. `tokenizer` is on rank 0 of the job only.
    """

    config: EngineConfig
    resolved: ResolvedModel
    pools: tuple[RankPool, ...]
    pool: RankPool
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
    tokenizer: Tokenizer | None

    def leave(self) -> None:
        """Finish the trace and close all connections; all ranks of the job call it together."""
        with failing(self.watchdog):
            if self.trace is not None:
                self.trace.finish()
            if self.bridge is not None:
                self.bridge.close()
        self.watchdog.close()
        finalize()


def start_rank(
    config: EngineConfig,
    info: LaunchInfo,
    *,
    show_progress: bool,
    on_stage: Callable[[str], None] | None = None,
) -> StartedRank:
    """Start this rank; what can be refused is refused before the first collective. On rank 0
    `on_stage` is called with the name of each stage.

    Raises:
        ConfigError, CheckpointError: the same on every rank, where it follows from shared facts.
    """
    progress = LoadProgress(show=show_progress, on_stage=on_stage)
    pools = split_rank_pools(config.parallel, info.world_size)
    pool = rank_pool_of(pools, info.rank)
    try:
        checked = check_rank(pool_config(config, pool), info)
    except (ConfigError, CheckpointError) as error:
        if info.world_size > 1:
            refuse(info, str(error))
        raise
    model = checked.resolved.config
    meeting = meet(config.parallel, model, info, progress)
    topology = meeting.topology
    tp_rank, _ = topology.coordinates(info.rank - pool.first)
    sparse = sparse_prefill(checked.config, model, topology, checked.transport, tp_rank=tp_rank)
    joined = join(
        meeting, info, pools, pool, checked.compute, step_timeout=checked.config.step_timeout
    )
    try:
        loaded, memory = _load_and_tell(checked, meeting, joined, info, pool, sparse, progress)
    except BaseException as error:
        # Other errors have ended the process, unless this rank is alone.
        _leave_early(joined)
        if isinstance(error, Refused):
            raise error.error from error.__cause__
        raise
    joined.watchdog.wait_for_work()
    return StartedRank(
        config=checked.config,
        resolved=checked.resolved,
        pools=pools,
        pool=pool,
        bridge=joined.bridge,
        groups=joined.groups,
        watchdog=joined.watchdog,
        executor=loaded.executor,
        trace=loaded.trace,
        num_blocks=loaded.cache.num_blocks,
        memory=tuple(map(RankMemory.decode, memory)),
        compute=checked.compute,
        sp_levels=tuple(topology.sp_levels),
        max_model_len=checked.max_model_len,
        transport=checked.transport,
        tokenizer=checked.tokenizer,
    )


def _leave_early(joined: Joined) -> None:
    """Close the connections of a start that has failed, as all other ranks do."""
    if joined.bridge is not None:
        joined.bridge.close()
    joined.watchdog.close()
    finalize()


@dataclass(frozen=True, slots=True)
class _Loaded:
    executor: Executor
    cache: CacheShare
    trace: TraceFile | None


def _load_and_tell(
    checked: CheckedRank,
    meeting: Meeting,
    joined: Joined,
    info: LaunchInfo,
    pool: RankPool,
    sparse: SparsePrefill | None,
    progress: LoadProgress,
) -> tuple[_Loaded, list[str]]:
    """What this rank has loaded, and the memory of all ranks, on rank 0 only."""
    store = meeting.store
    with failing(joined.watchdog):
        loaded = _load(checked, joined.groups, info, pool, sparse, progress, store)
        memory = tell_rank_zero(
            store,
            "memory",
            rank_memory(loaded.cache, loaded.executor.model.weights().values()).encode(),
            rank=info.rank,
            world_size=info.world_size,
        )
    return loaded, memory


def _load(
    checked: CheckedRank,
    groups: ParallelGroups,
    info: LaunchInfo,
    pool: RankPool,
    sparse: SparsePrefill | None,
    progress: LoadProgress,
    store: Store,
) -> _Loaded:
    """Load the weights, allocate the KV cache and set up attention; all ranks call it together."""
    config, model, compute = checked.config, checked.resolved.config, checked.compute
    pipeline, trace = make_pipeline(config, groups, compute.device)
    joined_s = progress.elapsed_s
    with agreeing(store, info, "loading the weights"):
        gpt = load_model(config.load_format, checked.resolved, groups, compute, progress)
    weights_s = progress.elapsed_s - joined_s
    progress.stage("allocating the KV cache")
    # Ranks agree on the number of blocks between the two, where each has found that some fit.
    with agreeing(store, info, "sizing the KV cache"):
        size = size_cache(
            config,
            model,
            groups,
            compute,
            info,
            checked.max_model_len,
            checked.transport,
            prefills=pool.name != "decode",
        )
    num_blocks = minimum(size.num_blocks, groups.control)
    with agreeing(store, info, "allocating the KV cache"):
        cache = allocate_cache(size, config, model, groups, compute, num_blocks)
    planner = None
    if checked.transport == "auto":
        progress.stage("preparing the choice of transports")
        planner = make_planner(config, model, groups, compute, info)
    forced = None if config.parallel.weights == "auto" else config.parallel.weights
    placement = measure_placement(forced, gpt, groups, compute.device)
    if groups.global_rank == 0:
        log.info(
            "%s: %s ranks (tp=%d sp=%d levels=%s) on %s in %s; joined in %.1f s, weights in "
            "%.1f s, KV cache of %d tokens",
            checked.resolved.name,
            pool.size if pool.name == "all" else f"{pool.size} {pool.name}",
            groups.tp.size,
            groups.sp.size,
            "x".join(str(level.size) for level in groups.sp_levels),
            compute.device.type,
            str(compute.dtype).removeprefix("torch."),
            joined_s,
            weights_s,
            cache.num_blocks * config.cache.block_size * groups.sp.size,
        )
    executor = Executor(
        gpt,
        model,
        cache.pool,
        groups,
        prefill=PrefillSetup(
            transport=checked.transport, sparse=sparse, planner=planner, pipeline=pipeline
        ),
        sparse_decode=config.decode_attention == "csa",
        graphs=make_decode_graphs(config, gpt, cache.pool, groups, compute.device),
        placement=placement,
        dtype=compute.dtype,
        device=compute.device,
    )
    return _Loaded(executor, cache, trace)
