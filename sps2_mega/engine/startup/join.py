"""Join the job: meet the other ranks, agree on the layout, and get groups, watchdog and bridge.

meet    rendezvous, topology     a layout that cannot work is the same ConfigError on all ranks
join    watchdog, groups         from here on a failure of one rank ends the job
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sps2_mega.comm.bridge import Bridge
from sps2_mega.comm.watchdog import Watchdog
from sps2_mega.config import ModelConfig, ParallelConfig
from sps2_mega.engine.failing import failing
from sps2_mega.engine.startup.load_progress import LoadProgress
from sps2_mega.mcore.init import Compute, agree_topology, finalize, initialize, open_store
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.parallel.rank_pools import RankPool
from sps2_mega.parallel.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import Store


@dataclass(frozen=True, slots=True)
class Meeting:
    """The store that all ranks of the job share, and the topology of this rank's pool."""

    store: Store
    topology: Topology


@dataclass(frozen=True, slots=True)
class Joined:
    """Connections of a rank: groups within its pool, and the `bridge` to the other pool, if any."""

    groups: ParallelGroups
    watchdog: Watchdog
    bridge: Bridge | None


def meet(
    parallel: ParallelConfig, model: ModelConfig, info: LaunchInfo, progress: LoadProgress
) -> Meeting:
    """Wait for the other ranks and agree with them on the layout of the job and on the model.

    Raises:
        ConfigError: the same on every rank.
    """
    if info.world_size > 1:
        others = info.world_size - 1
        progress.stage(f"waiting for {others} other rank{'s' if others > 1 else ''}")
    store = open_store(info)
    return Meeting(store, agree_topology(store, info, parallel, model=model))


def join(
    meeting: Meeting,
    info: LaunchInfo,
    pools: Sequence[RankPool],
    pool: RankPool,
    compute: Compute,
    *,
    step_timeout: float,
) -> Joined:
    """Start the watchdog and create the groups of `pool`; all ranks of the job call it together.
    `step_timeout` is in seconds."""
    store = meeting.store
    watchdog = Watchdog.start(
        info,
        publish=lambda address: store.set("sps2/watchdog", address),
        lookup=lambda: store.get("sps2/watchdog").decode(),
        step_timeout=step_timeout,
    )
    try:
        with failing(watchdog):
            groups = initialize(
                store,
                info,
                meeting.topology,
                device=compute.device,
                timeout_s=step_timeout,
                pool=pool,
            )
            bridge = Bridge.open(store, info.rank, info.world_size) if len(pools) > 1 else None
            return Joined(groups, watchdog, bridge)
    except BaseException:
        watchdog.close()
        finalize()
        raise
