"""Short prompts that lie whole on one SP rank each give the tokens of spread ones, and their
prefill moves nothing."""

from __future__ import annotations

import os

import families
import pytest
from engine_run import assert_same, run_engine
from harness import free_port, run_ranks

from sps2_mega.config import CSAConfig

APART = dict(sp_threshold=150)


@pytest.fixture(scope="module")
def requests():
    """The last two begin like the second, on one rank, and like the fourth, on all ranks."""
    texts = families.prompts((33, 100, 1, 300, 16, 7, 129, 149, 20, 30), seed=8)
    texts[8] = texts[1][:80] + texts[8]
    texts[9] = texts[3][:80] + texts[9]
    return [(text, dict(max_tokens=12, seed=i, ignore_eos=True)) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def expected(model, requests):
    return run_engine(model, requests, waves=(8,))


@pytest.mark.parametrize(
    ("tp", "sp", "scheduler", "stagger"),
    [(1, 3, {}, 0), (1, 2, dict(tbt_target_ms=1.0, overtake=0.0), 2)],
    ids=["sp3", "sliced"],
)
def test_whole_on_one_rank_gives_the_tokens_of_one_rank(
    model, requests, expected, tp, sp, scheduler, stagger
):
    options = model | dict(scheduler=APART | scheduler)
    outputs = run_engine(options, requests, tp=tp, sp=sp, waves=(8,), stagger=stagger)
    assert_same(outputs, expected)


def test_sparse_prompts_on_one_rank_see_what_spread_ones_see(model, requests):
    csa = CSAConfig(degrees=(1, 4), spans=(48,), sinks=4, halo=10, tail=20)
    options = model | dict(csa=csa, cache=dict(no_prefix_caching=True))
    spread = run_engine(options | dict(scheduler=dict(sp_threshold=0)), requests, sp=2)
    apart = run_engine(options | dict(scheduler=APART), requests, sp=2)
    assert_same(apart, spread)


def bytes_on_rank(rank, port, options, prompt_lens, sp):
    """Bytes sent between SP ranks while prompts are prefilled, on rank 0."""
    from sps2_mega.config import EngineConfig, ParallelConfig, SchedulerConfig
    from sps2_mega.engine.start import driver_of, worker_of
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.parallel.launcher import from_environment
    from sps2_mega.types import SamplingParams

    os.environ["MASTER_PORT"] = str(port)
    scheduler = SchedulerConfig(sp_threshold=100)
    # Attention alone is asked about: few rows may share the reading of weights, which sends them.
    parallel = ParallelConfig(sp=sp, weights="owner")
    config = EngineConfig(parallel=parallel, scheduler=scheduler, **options)
    started = start_rank(config, from_environment(), show_progress=False)
    traffic = started.groups.sp.traffic
    if rank > 0:
        worker_of(started).run()
        return traffic.bytes_sent
    engine = driver_of(started)
    before = traffic.bytes_sent
    for number, length in enumerate(prompt_lens):
        engine.add_request(str(number), [number + 1] * length, SamplingParams(max_tokens=1))
    engine.step()
    assert not engine.has_work()
    engine.shutdown()
    return traffic.bytes_sent - before


def test_prompts_on_one_rank_each_move_nothing(model):
    """Also with a rank that has no prompt, and none of them is longer than the others' ranks."""
    for prompt_lens, moves in (((60, 33, 99), False), ((60,), False), ((60, 100), True)):
        sent = run_ranks(bytes_on_rank, 3, free_port(), model, prompt_lens, 3)
        assert (sum(sent) > 0) is moves, (prompt_lens, sent)
