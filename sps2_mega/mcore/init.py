"""Start of a job: rendezvous, layout check, Megatron's parallel state, groups.

Every refusal happens between the rendezvous and the first collective, where all ranks
still see the same facts through the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sps2_mega.config import ModelConfig, ParallelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.mcore._compat import eager_import, without_warnings
from sps2_mega.parallel.groups import Group, ParallelGroups
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.parallel.rank_pools import RankPool, rank_pool_of, split_rank_pools
from sps2_mega.parallel.topology import Topology, build_topology

# Ranks wait for the next plan without limit; dead peers are left to the watchdog.
_CONTROL_TIMEOUT = timedelta(days=30)
_RENDEZVOUS_TIMEOUT = timedelta(seconds=120)


def open_store(info: LaunchInfo) -> dist.Store:
    """Open the key-value store that all ranks share, the launcher's own if it has one.

    Raises:
        ConfigError: the master port is taken, or rank 0 cannot be reached in time.
    """
    if info.world_size == 1:
        return dist.HashStore()
    # Without a launcher the address is in `info` only, not in this process's environment.
    url = f"tcp://{info.master_addr}:{info.master_port}" if info.launcher == "env" else "env://"
    try:
        store, _, _ = next(
            dist.rendezvous(url, info.rank, info.world_size, timeout=_RENDEZVOUS_TIMEOUT)
        )
    except dist.DistNetworkError as error:
        where = f"{info.master_addr}:{info.master_port}"
        hint = (
            "another job may use the port: give the launcher another one (--master_port)"
            if "EADDRINUSE" in str(error)
            else "is that the address of rank 0's node, and has rank 0 started?"
        )
        reason = str(error).splitlines()[0]
        raise ConfigError(f"ranks cannot meet at {where}: {hint} ({reason})") from error
    store.set_timeout(_RENDEZVOUS_TIMEOUT)
    return store


def agree_topology(
    store: dist.Store,
    info: LaunchInfo,
    parallel: ParallelConfig,
    *,
    model: ModelConfig | None = None,
    problem: str | None = None,
) -> Topology:
    """Exchange node names and degrees, check them, and return the layout of this rank's pool.

    All ranks check the same facts: the architecture too, which each reads on its own machine.
    `problem` is a reason found on this rank alone (a missing
    folder, a missing GPU) for which the job cannot run; the job then ends on all ranks with
    that reason, instead of leaving the others waiting.

    Raises:
        ConfigError: the same error on every rank.
    """
    degrees = f"tp={parallel.tp} sp={parallel.sp} sp_levels={parallel.sp_levels}"
    if parallel.decode_ranks:
        degrees += f" decode_ranks={parallel.decode_ranks} decode_tp={parallel.decode_tp}"
    mine = {
        "node": f"{socket.gethostname()}#{info.node_rank}",
        "degrees": degrees,
        "model": {} if model is None else dataclasses.asdict(model),
        "problem": problem,
    }
    store.set(f"sps2/rank/{info.rank}", json.dumps(mine))
    ranks = [json.loads(store.get(f"sps2/rank/{rank}")) for rank in range(info.world_size)]
    try:
        _check_agreement(ranks)
        pools = split_rank_pools(parallel, info.world_size)
        nodes = [rank["node"] for rank in ranks]
        # Topologies of all pools, so that a problem of one is an error on every rank.
        topologies = {pool.name: _topology(pool, parallel, nodes) for pool in pools}
    except ConfigError:
        _leave_store(store, info)
        raise
    return topologies[rank_pool_of(pools, info.rank).name]


def _topology(pool: RankPool, parallel: ParallelConfig, nodes: list[str]) -> Topology:
    try:
        return build_topology(
            tp=pool.tp,
            sp=pool.sp,
            # Levels describe the ranks that prefill: decode has no use for them.
            sp_levels=None if pool.name == "decode" else parallel.sp_levels,
            nodes=[nodes[rank] for rank in pool.global_ranks],
        )
    except ConfigError as error:
        if pool.name == "all":
            raise
        raise ConfigError(
            f"{pool.name} ranks {pool.first} to {pool.global_ranks[-1]}: {error}"
        ) from error


def refuse(info: LaunchInfo, problem: str) -> None:
    """Tell the other ranks, which are about to meet this one, that the job cannot run."""
    with contextlib.suppress(ConfigError):
        agree_topology(open_store(info), info, ParallelConfig(), problem=problem)


def _check_agreement(ranks: list[dict[str, Any]]) -> None:
    problems = {number: rank["problem"] for number, rank in enumerate(ranks) if rank["problem"]}
    if problems:
        distinct = set(problems.values())
        texts = [f"rank {number}: {text}" for number, text in problems.items()]
        raise ConfigError(distinct.pop() if len(distinct) == 1 else "; ".join(texts))
    for number, rank in enumerate(ranks):
        if rank["degrees"] != ranks[0]["degrees"]:
            raise ConfigError(
                f"ranks disagree: rank 0 has {ranks[0]['degrees']}, rank {number} has "
                f"{rank['degrees']}"
            )
        mine, first = rank["model"], ranks[0]["model"]
        for name in first:
            if mine.get(name) == first[name]:
                continue
            raise ConfigError(
                f"ranks disagree on the model: rank 0 has {name}={first[name]!r}, rank {number} "
                f"has {mine.get(name)!r}"
            )


def _leave_store(store: dist.Store, info: LaunchInfo) -> None:
    """Keep the store, which rank 0 may host, until every rank has read the problem."""
    store.set(f"sps2/read/{info.rank}", "")
    if info.rank == 0:
        with contextlib.suppress(RuntimeError):
            everybody = [f"sps2/read/{rank}" for rank in range(info.world_size)]
            store.wait(everybody, timedelta(seconds=10))


def initialize(
    store: dist.Store,
    info: LaunchInfo,
    topology: Topology,
    *,
    device: torch.device,
    timeout_s: float,
    pool: RankPool | None = None,
) -> ParallelGroups:
    """Create all groups through Megatron's parallel state (its context-parallel axis is our SP).

    The world of the groups, and torch's default group, are the ranks of `pool`, with layout
    `topology`; None: all ranks of the job.
    """
    if pool is None:
        pool = RankPool(name="all", first=0, tp=topology.tp, sp=topology.sp)
    with eager_import(device.type):
        from megatron.core import parallel_state

    timeout = timedelta(seconds=timeout_s)
    with without_warnings():
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore(f"sps2/world/{pool.name}", store),
            rank=info.rank - pool.first,
            world_size=pool.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tp,
            context_parallel_size=topology.sp,
            hierarchical_context_parallel_sizes=(
                list(topology.sp_levels) if len(topology.sp_levels) > 1 else None
            ),
            distributed_timeout_minutes=max(1, int(timeout_s // 60)),
            # Second communicators of optimizers. A gloo group is three threads that wake up often.
            create_gloo_process_groups=False,
        )
    control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
    sp = parallel_state.get_context_parallel_group()
    levels = (
        parallel_state.get_hierarchical_context_parallel_groups()
        if len(topology.sp_levels) > 1
        else [sp]
    )
    sp_group = _group(sp)
    return ParallelGroups(
        global_rank=info.rank - pool.first,
        world_size=pool.size,
        control=_group(control),
        tp=_group(parallel_state.get_tensor_model_parallel_group()),
        sp=sp_group,
        sp_back=_way_back(sp_group, topology, timeout),
        sp_levels=tuple(_group(level) for level in levels),
    )


def finalize() -> None:
    """Leave all groups; safe to call if nothing was initialised."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    # Groups are parts of reference cycles, and their threads live as long as they do.
    gc.collect()


def _way_back(sp: Group, topology: Topology, timeout: timedelta) -> Group:
    """Create a second communicator over the ranks of `sp`.

    Every rank creates the communicators of all SP groups, in the same order.
    """
    if topology.sp == 1:
        return sp
    handle, _ = dist.new_subgroups_by_enumeration(topology.sp_groups(), timeout=timeout)
    return Group(rank=sp.rank, size=sp.size, handle=handle, traffic=sp.traffic)


def _group(handle: dist.ProcessGroup) -> Group:
    size = handle.size()
    return Group(rank=handle.rank(), size=size, handle=handle if size > 1 else None)


@dataclass(frozen=True, slots=True)
class Compute:
    """Device and dtype of this rank's computation."""

    device: torch.device
    dtype: torch.dtype


def choose_compute(device: str, dtype: str, checkpoint_dtype: str, local_rank: int) -> Compute:
    """Resolve `auto`: the checkpoint's type on CUDA, float32 on CPU.

    On CPU 16 bits are not faster, and their rounding would make text depend on the layout.

    Raises:
        ConfigError: CUDA is requested but missing, or a node has fewer devices than ranks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was requested, but torch finds no CUDA device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} needs its own CUDA device, "
                f"but this node has {torch.cuda.device_count()}"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    if dtype == "auto":
        dtype = checkpoint_dtype if chosen.type == "cuda" else "float32"
    return Compute(chosen, getattr(torch, dtype))
