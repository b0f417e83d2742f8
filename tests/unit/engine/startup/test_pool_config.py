"""Configuration of each rank pool, and settings that cannot be combined with decode ranks."""

from __future__ import annotations

import pytest

from sps2_mega.config import CSAConfig, EngineConfig, ParallelConfig, SchedulerConfig
from sps2_mega.engine.startup.pool_config import pool_config
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.rank_pools import split_rank_pools

PARALLEL = ParallelConfig(tp=1, sp=2, sp_levels=(2,), decode_ranks=2, decode_tp=2)
PREFILL, DECODE = split_rank_pools(PARALLEL, 4)


def test_decode_ranks_have_their_own_shape_and_nothing_that_is_prefill():
    config = EngineConfig(
        parallel=PARALLEL,
        csa=CSAConfig(degrees=(1, 4)),
        transport="gather,ulysses",
        pipeline="on",
        micro_batches=3,
        trace="trace.json",
    )
    decode = pool_config(config, DECODE)
    assert decode.parallel == ParallelConfig(tp=2, sp=1)
    assert decode.csa.exact and decode.trace is None and decode.micro_batches is None
    prefill = pool_config(config, PREFILL)
    assert (prefill.csa, prefill.transport, prefill.trace) == (
        config.csa,
        config.transport,
        "trace.json",
    )


def test_a_job_without_sides_is_left_alone():
    config = EngineConfig(scheduler=SchedulerConfig(policy="sarathi"), decode_attention="csa")
    (pool,) = split_rank_pools(ParallelConfig(), 1)
    assert pool_config(config, pool) is config


@pytest.mark.parametrize("pool", [PREFILL, DECODE])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(scheduler=SchedulerConfig(policy="sarathi")), "scheduler sarathi .* decode_ranks=2"),
        (dict(decode_attention="csa"), "decode_attention csa .* decode_ranks=2"),
    ],
)
def test_what_needs_both_kinds_of_work_on_a_rank_is_refused_on_all_ranks(pool, options, text):
    with pytest.raises(ConfigError, match=text):
        pool_config(EngineConfig(parallel=PARALLEL, **options), pool)
