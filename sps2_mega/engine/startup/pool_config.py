"""Configuration of one rank pool: how it differs from that of a job without decode ranks.

Refuses what cannot be combined with separate decode ranks. The pools are defined in
`parallel.rank_pools`.
"""

from __future__ import annotations

import dataclasses

from sps2_mega.config import CSAConfig, EngineConfig, ParallelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.rank_pools import RankPool


def pool_config(config: EngineConfig, pool: RankPool) -> EngineConfig:
    """Configuration of the job as a rank of `pool` uses it.

    The decode pool never prefills: it needs no sparse pattern, plans no transports and traces
    nothing.

    Raises:
        ConfigError: a policy that needs both kinds of work on the same ranks; the same error on all
            ranks.
    """
    if pool.name == "all":
        return config
    asked = f"decode_ranks={config.parallel.decode_ranks}"
    if config.scheduler.policy != "sps2":
        raise ConfigError(
            f"scheduler {config.scheduler.policy} mixes prefill and decode in one step, which "
            f"{asked} separates"
        )
    if config.decode_attention != "dense":
        raise ConfigError(
            f"decode_attention {config.decode_attention} cannot be combined with {asked}: "
            "its pattern follows the ranks that prefilled"
        )
    if pool.name == "prefill":
        return config
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(tp=pool.tp, sp=pool.sp),
        csa=CSAConfig(degrees=(1,)),
        transport="ulysses",
        pipeline="off",
        micro_batches=None,
        trace=None,
    )
