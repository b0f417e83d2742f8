"""Whole simulations: traces by hand, conservation, disaggregation, prefixes, determinism."""

from __future__ import annotations

import itertools
import random

import pytest

from sps2_mega.config import CSAConfig
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival, scaled
from sps2_mega.simulator.collectives import all_reduce_s
from sps2_mega.simulator.prompt import Prompt
from sps2_mega.simulator.simulator import simulate
from sps2_mega.simulator.step_cost import step_cost
from sps2_mega.simulator.system import System
from tests.simulator.small_model import MODEL, ROUND

SYSTEMS = [
    System(name="one"),
    System(name="sarathi", policy="sarathi", tp=4, chunk_tokens=256, elastic=False),
    System(name="replicas", policy="sarathi", tp=2, replicas=3, chunk_tokens=64),
    System(name="sp", sp=8),
    System(name="csa", sp=8, csa=CSAConfig(degrees=(1, 2, 4))),
    System(name="ring", sp=4, transports=("ring",), pipelined=False, decode_move="keys"),
    System(name="split", sp=4, decode_replicas=2, decode_tp=2),
    System(name="yields", sp=4, tbt_target_ms=0.5),
]


def some_arrivals(count: int, seed: int = 0) -> list[Arrival]:
    draw = random.Random(seed)
    time_s, arrivals = 0.0, []
    for _ in range(count):
        time_s += draw.expovariate(50.0)
        prompt_len = draw.choice([1, 2, 63, 64, 65, 1000, 12_345])
        arrivals.append(
            Arrival(time_s=time_s, prompt_len=prompt_len, output_len=draw.choice([1, 2, 40]))
        )
    return arrivals


def test_two_requests_on_one_gpu_take_the_seconds_of_their_steps():
    arrivals = [
        Arrival(time_s=1.0, prompt_len=1000, output_len=3),
        Arrival(time_s=1.0, prompt_len=500, output_len=1),
    ]
    system = System(name="one", max_prefill_tokens=1000)
    cost = step_cost(system, MODEL, ROUND, tp=1, sp=1)

    def step(prompts, decodes, context, sampled):
        terms = cost.of_tokens(prompts, num_decodes=decodes, context=context, num_sampled=sampled)
        return sum(terms.values())

    first = step([Prompt(start=0, end=1000)], 0, 0, 1)
    second = step([Prompt(start=0, end=500)], 0, 0, 1)
    third, fourth = step([], 1, 1001, 1), step([], 1, 1002, 1)
    run = simulate(arrivals, system, MODEL, ROUND)
    assert run.timings[0].ttft_s == pytest.approx(first)
    assert run.timings[1].ttft_s == pytest.approx(first + second)
    assert run.timings[0].gaps_s == pytest.approx((second + third, fourth))
    assert run.duration_s == pytest.approx(first + second + third + fourth)
    assert sum(run.terms.values()) == pytest.approx(run.duration_s)


def test_a_prefill_step_on_one_gpu_by_hand():
    terms = step_cost(System(name="one"), MODEL, ROUND, tp=1, sp=1).of_tokens(
        [Prompt(start=0, end=1000)], num_decodes=0, context=0, num_sampled=1
    )
    params = 1024 * 3072 + 3 * 1024 * 4096
    assert terms["linear"] == pytest.approx(2 * 2 * 1000 * params / 1e14)
    assert terms["attention"] == pytest.approx(2 * 4 * 128 * 8 * 500_500 / 5e13)
    assert terms["kv_write"] == pytest.approx(2 * 1000 * 2048 / 1e12)
    assert terms["overhead"] == pytest.approx(2e-6)
    assert terms["head"] == pytest.approx(1000 * 1024 * 2 / 1e12)
    assert terms["tp_all_reduce"] == terms["transport"] == terms["merge"] == 0.0


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_every_request_gets_all_its_tokens_in_order(system):
    arrivals = some_arrivals(60)
    finished = []
    run = simulate(arrivals, system, MODEL, ROUND, on_finished=lambda: finished.append(1))
    assert run.refused == 0 and len(run.timings) == len(finished) == 60
    for timing, arrival in zip(run.timings, arrivals, strict=True):
        assert len(timing.gaps_s) == arrival.output_len - 1
        assert timing.ttft_s > 0 and all(gap > 0 for gap in timing.gaps_s)
        assert timing.total_s == pytest.approx(timing.ttft_s + sum(timing.gaps_s))
    assert 0 < run.busy_share <= 1 + 1e-9 and 0 < run.peak_kv_usage <= 1
    prefilled = sum(meter.prefill_tokens for meter in run.meters)
    assert prefilled == sum(a.prompt_len for a in arrivals) or run.num_preemptions


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_the_same_arguments_give_the_same_run(system):
    first = simulate(some_arrivals(20), system, MODEL, ROUND)
    assert first.timings == simulate(some_arrivals(20), system, MODEL, ROUND).timings


def test_no_arrivals_are_no_run():
    run = simulate([], System(name="one"), MODEL, ROUND)
    assert run.timings == () and run.duration_s == 0.0


def test_a_prompt_larger_than_the_cache_is_refused_and_the_others_go_on():
    arrivals = [
        Arrival(time_s=0.0, prompt_len=10_000_000, output_len=1),
        Arrival(time_s=0.0, prompt_len=63, output_len=2),
    ]
    run = simulate(arrivals, System(name="one"), MODEL, ROUND)
    assert run.refused == 1 and run.prompt_lens == (63,)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"0\.0\d* GB|leave no room"):
        simulate([], System(name="one"), MODEL, ROUND.replace(memory_bytes=1e6))


def test_a_full_cache_preempts_and_still_finishes():
    arrivals = [Arrival(time_s=0.0, prompt_len=640, output_len=300) for _ in range(40)]
    small = ROUND.replace(memory_bytes=120e6)
    run = simulate(arrivals, System(name="one"), MODEL, small)
    assert run.num_preemptions > 0 and len(run.timings) == 40


def test_named_blocks_are_prefilled_once():
    names = tuple(range(20))
    arrivals = [
        Arrival(time_s=float(i), prompt_len=20 * 512, output_len=2, hash_ids=names)
        for i in range(5)
    ]
    again = simulate(arrivals, System(name="x", sp=4, prefix_caching=True), MODEL, ROUND)
    fresh = simulate(arrivals, System(name="x", sp=4), MODEL, ROUND)
    assert again.cached_tokens == 4 * (20 * 512 - 64) and fresh.cached_tokens == 0
    assert again.timings[1].ttft_s < fresh.timings[1].ttft_s / 2


def test_decode_engines_keep_prefills_out_of_the_gaps():
    arrivals = [Arrival(time_s=0.0, prompt_len=64, output_len=50)] + [
        Arrival(time_s=0.001 * i, prompt_len=12_345, output_len=2) for i in range(1, 30)
    ]
    together = simulate(arrivals, System(name="together", sp=4), MODEL, ROUND)
    split = simulate(
        arrivals, System(name="split", sp=4, decode_replicas=1, decode_tp=4), MODEL, ROUND
    )
    assert max(split.timings[0].gaps_s) < max(together.timings[0].gaps_s) / 2
    assert split.system.num_gpus == 8


def test_a_prefill_that_gives_way_keeps_the_gaps_near_the_target():
    arrivals = [Arrival(time_s=0.0, prompt_len=64, output_len=400)] + [
        Arrival(time_s=0.001 * i, prompt_len=12_345, output_len=2) for i in range(1, 30)
    ]
    whole = simulate(arrivals, System(name="whole", sp=4), MODEL, ROUND)
    yields = simulate(arrivals, System(name="yields", sp=4, tbt_target_ms=1.0), MODEL, ROUND)
    gaps = sorted(yields.timings[0].gaps_s)
    assert gaps[-8] < 1.2e-3 < max(whole.timings[0].gaps_s) / 2
    assert sum(meter.prefill_tokens for meter in yields.meters) == 64 + 29 * 12_345


def test_slices_of_a_pass_cost_what_the_pass_costs():
    cost = step_cost(System(name="x", sp=4), MODEL, ROUND, tp=1, sp=4)
    prompts = [Prompt(start=100, end=1001)]
    whole = cost.of_tokens(prompts, num_decodes=0, context=0, num_sampled=1)
    slices = [
        cost.of_slice(prompts, num_layers=1, num_sampled=sampled)
        for sampled in [0] * (MODEL.num_layers - 1) + [1]
    ]
    for name, seconds in whole.items():
        assert sum(terms[name] for terms in slices) == pytest.approx(seconds)


def test_a_slice_that_ends_in_one_layer_and_begins_the_next_costs_both_parts():
    cost = step_cost(System(name="x", sp=4), MODEL, ROUND, tp=1, sp=4)
    both = cost.of_chunks([(600, 1001), (100, 333)], first=100, num_sampled=0)
    apart = [
        cost.of_chunks([chunk], first=100, num_sampled=0) for chunk in ((600, 1001), (100, 333))
    ]
    for name in ("attention", "transport", "merge", "linear", "kv_write"):
        assert both[name] == pytest.approx(sum(terms[name] for terms in apart))


@pytest.mark.parametrize("csa", [CSAConfig(), CSAConfig(degrees=(1, 4))])
@pytest.mark.parametrize("sp", [1, 4])
def test_chunks_attend_as_the_whole_prompt_and_bring_its_keys_once(csa, sp):
    system = System(name="x", sp=sp, csa=csa if sp > 1 else CSAConfig(), transports=("gather",))
    cost = step_cost(system, MODEL, ROUND, tp=1, sp=sp)
    bounds = [900, 1801, 30_000, 60_001]
    layers = [cost.of_chunks([(0, 60_001)], first=0, num_sampled=0)]
    layers.append(cost.of_chunks(list(itertools.pairwise([0, *bounds])), first=0, num_sampled=0))
    whole, cut = layers
    assert cut["attention"] == pytest.approx(whole["attention"], rel=0.02)
    assert cut["linear"] == pytest.approx(whole["linear"])
    # What came with the chunks before is not sent again, and hides behind them but for the first
    # one.
    assert cut["transport"] <= whole["transport"]
    assert (whole["transport"] > 0) == (sp > 1)
    prompt = cost.of_slice([Prompt(start=0, end=60_001)], num_layers=1, num_sampled=0)
    assert whole["attention"] == pytest.approx(prompt["attention"], rel=0.15)


def test_cached_keys_come_with_the_first_chunk_of_a_layer():
    cost = step_cost(System(name="x", sp=4), MODEL, ROUND, tp=1, sp=4)
    first = cost.of_chunks([(5000, 5100)], first=5000, num_sampled=0)
    later = cost.of_chunks([(5000, 5100)], first=4900, num_sampled=0)
    assert first["transport"] > later["transport"]
    assert first["attention"] == pytest.approx(later["attention"], rel=0.3)


def test_local_prefill_of_short_prompts_is_never_slower():
    prompts = [Prompt(start=0, end=n) for n in (1, 63, 700, 700, 1000, 1000, 30)]
    elastic = step_cost(System(name="x", sp=8), MODEL, ROUND, tp=1, sp=8)
    rigid = step_cost(System(name="x", sp=8, elastic=False), MODEL, ROUND, tp=1, sp=8)

    def seconds(cost):
        return sum(cost.of_tokens(prompts, num_decodes=0, context=0, num_sampled=7).values())

    assert seconds(elastic) < seconds(rigid)


def test_scaling_changes_times_and_lengths_and_forgets_names():
    arrival = Arrival(time_s=10.0, prompt_len=512, output_len=3, hash_ids=(1,))
    (faster,) = scaled([arrival], rate=2.0)
    assert faster.time_s == 5.0 and faster.hash_ids == (1,)
    (longer,) = scaled([arrival], length=8.0)
    assert longer.prompt_len == 4096 and longer.hash_ids == ()
    with pytest.raises(ConfigError, match="factors must be > 0"):
        scaled([arrival], rate=0.0)


def test_the_hosts_share_and_the_embeddings_sum_come_once_in_a_step():
    slow = ROUND.replace(step_overhead_s=0.5)
    prompt = [Prompt(start=0, end=1001)]
    cost = step_cost(System(name="x", tp=2), MODEL, slow, tp=2, sp=1)
    found = cost.of_tokens(prompt, num_decodes=0, context=0, num_sampled=1)
    assert found["host"] == 0.5
    # Two sums in each of the two layers, and one more.
    summed = all_reduce_s(1001 * MODEL.hidden_size * cost.size.itemsize, 2, slow)
    assert found["tp_all_reduce"] == pytest.approx(5 * summed)
    plain = step_cost(System(name="x"), MODEL, ROUND, tp=1, sp=1)
    assert "host" not in plain.of_tokens(prompt, num_decodes=0, context=0, num_sampled=1)
