"""Costs equal the planner's estimates at equal shares; CSA costs follow the pattern's counts."""

from __future__ import annotations

import pytest

from sps2_mega.attention.csa.pattern import CSAPattern, topology_spans
from sps2_mega.attention.layout.causal_pairs import causal_pairs
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.planner.exact import TRANSPORTS, estimate
from sps2_mega.attention.planner.sparse_volume import flops_ratio, long_flops_ratio
from sps2_mega.attention.planner.step_shape import StepShape, step_shape
from sps2_mega.config import CSAConfig
from sps2_mega.errors import ConfigError
from sps2_mega.kv_cache.placement import Spread, spread_block_ranks
from sps2_mega.simulator.prompt import Prompt
from sps2_mega.simulator.sparse_cost import sparse_cost
from sps2_mega.simulator.transport_cost import fastest, transport_costs
from tests.simulator.small_model import ROUND

HEADS = dict(num_heads=8, num_kv_heads=4, head_dim=128, itemsize=2)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("tp", "sp"), [(4, 3), (1, 4), (1, 8), (2, 6)])
@pytest.mark.parametrize(("new", "cached"), [(24, 0), (24_000, 0), (2400, 240_000)])
def test_a_step_of_equal_shares_costs_what_the_planner_says(transport, tp, sp, new, cached):
    machine = ROUND.sp_machine(tp, sp)
    keys, pairs = new + cached, causal_pairs(range(cached, cached + new))
    shape = StepShape(
        queries=(new // sp,) * sp,
        keys=(keys // sp,) * sp,
        pairs=((int(pairs / sp / sp),) * sp,) * sp,
        **HEADS,
    )
    (cost,) = transport_costs([transport], machine, **HEADS)
    planned = estimate(transport, shape, machine, overlap=False)
    priced = cost.seconds(pairs, new, keys, ROUND, pipelined=False)
    assert priced.comm_s == pytest.approx(planned.comm_s, rel=1e-9)
    # The planner does not count the reading of keys, which bounds short steps.
    assert priced.compute_s >= planned.compute_s * 0.999
    if new == 24_000:
        assert priced.compute_s == pytest.approx(planned.compute_s, rel=1e-3)
    piped = cost.seconds(pairs, new, keys, ROUND, pipelined=True)
    assert max(piped.compute_s, piped.comm_s) <= piped.compute_s + piped.exposed_s + 1e-12
    # Parts pay latencies of their own; beside that nothing gets slower.
    more_s = piped.compute_s + piped.comm_s - priced.compute_s - priced.comm_s
    assert more_s >= -1e-12 and piped.total_s <= priced.total_s + more_s + 1e-12


@pytest.mark.parametrize("transport", ["ulysses", "gather", "pass_q"])
def test_a_layer_is_cut_into_as_many_parts_as_the_planner_says(transport):
    machine = ROUND.sp_machine(4, 2)
    for new, cached in [(24, 0), (24_000, 0), (240_000, 0), (24_000, 240_000)]:
        pairs = causal_pairs(range(cached, cached + new))
        shape = StepShape(
            queries=(new // 2,) * 2,
            keys=((new + cached) // 2,) * 2,
            pairs=((int(pairs / 4),) * 2,) * 2,
            **HEADS,
        )
        planned = estimate(transport, shape, machine)
        (cost,) = transport_costs([transport], machine, **HEADS)
        whole, cut = (
            cost.seconds(pairs, new, new + cached, ROUND, pipelined=on) for on in (False, True)
        )
        latencies = planned.messages - estimate(transport, shape, machine, overlap=False).messages
        paid = (cut.comm_s - whole.comm_s) / max(link.latency_s for link in machine.links)
        assert paid == pytest.approx(latencies, abs=1e-6)
        # Reading of keys bounds short steps, and the planner was given no merges.
        piped_s = cut.total_s - cut.merge_s
        assert piped_s >= planned.seconds * 0.999
        if new >= 24_000:
            assert piped_s == pytest.approx(planned.seconds, rel=1e-3)


def test_one_rank_moves_nothing():
    costs = transport_costs(TRANSPORTS, ROUND.sp_machine(1, 1), **HEADS)
    for cost in costs:
        found = cost.seconds(causal_pairs(range(63)), 63, 63, ROUND, pipelined=True)
        assert (found.comm_s, found.exposed_s, found.merge_s) == (0.0, 0.0, 0.0)


def test_few_new_tokens_behind_a_long_prefix_move_queries():
    costs = transport_costs(TRANSPORTS, ROUND.sp_machine(4, 2), **HEADS)
    end, new = 500_000, 16
    found = fastest(costs, causal_pairs(range(end - new, end)), new, end, ROUND, pipelined=True)
    assert found.transport == "pass_q"
    whole = fastest(costs, causal_pairs(range(end)), end, end, ROUND, pipelined=True)
    assert whole.transport != "pass_q"


@pytest.mark.parametrize("size", [2, 3, 8])
def test_partials_are_as_many_as_a_zigzag_layout_has(size):
    block, blocks = 16, 24 * size
    ranks = spread_block_ranks(blocks, [blocks] * size, Spread("zigzag"))
    layout = build_layout([ranks], [block * blocks], block_size=block, sp_size=size)
    shape = step_shape(layout, **HEADS)
    assert shape.calls is not None and shape.partial_rows is not None
    queries = block * blocks / size
    assert max(map(sum, shape.calls)) == 2 * size
    assert max(map(sum, shape.partial_rows)) == size * queries
    (ring,) = transport_costs(["ring"], ROUND.sp_machine(1, size), **HEADS)
    found = ring.seconds(1.0, block * blocks, block * blocks, ROUND, pipelined=True)
    assert found.merge_s == pytest.approx(ring.merging_s(queries, size, ROUND))


@pytest.mark.parametrize(("sp", "degrees"), [(4, (1, 2)), (8, (1, 2, 4)), (8, (1, 4, 4))])
def test_sparse_arithmetic_follows_the_pattern(sp, degrees):
    machine = ROUND.sp_machine(1, sp)
    csa = CSAConfig(degrees=degrees, sinks=0, halo=0, tail=0)
    cost = sparse_cost(csa, machine, **HEADS)
    length = 64 * 1024
    prompt = [Prompt(start=0, end=length)]
    # Ulysses on all levels deals far work evenly; the own cells are equal.
    (dealt,) = [w for w in cost.combinations if set(w.transports) == {"ulysses"}]
    sizes = (1, *machine.sp_levels) if len(machine.sp_levels) == 1 else (1, 4, 8)
    pattern = CSAPattern(
        degrees=degrees,
        spans=topology_spans(length // sp, sizes),
        sinks=0,
        halo=0,
        tail=0,
        sample_queries=False,
    )
    ratio = flops_ratio(pattern, prompt_len=length, kv_heads=range(4), layer=0)
    assert ratio == pytest.approx(long_flops_ratio(sizes, degrees, sample_queries=False), rel=0.02)
    dense_s = 4.0 * 128 * 8 * causal_pairs(range(length)) / sp / ROUND.attention_flops_per_s
    # Heads of different residues see a different number of far keys: that much imbalance is real.
    assert dealt.compute_s * length**2 == pytest.approx(ratio * dense_s, rel=0.05)
    # The tail and the halo come on top, and grow with the length only.
    tailed = sparse_cost(CSAConfig(degrees=degrees), machine, **HEADS)
    more = tailed.seconds(prompt, ROUND, pipelined=False)
    less = cost.seconds(prompt, ROUND, pipelined=False)
    assert less.compute_s < more.compute_s < 1.3 * less.compute_s


def test_sparser_is_cheaper_and_given_spans_are_refused():
    machine = ROUND.sp_machine(1, 4)
    prompt = [Prompt(start=0, end=100_001), Prompt(start=0, end=1)]
    seconds = [
        sparse_cost(CSAConfig(degrees=(1, d)), machine, **HEADS).seconds(
            prompt, ROUND, pipelined=True
        )
        for d in (1, 2, 4, 8)
    ]
    totals = [found.total_s for found in seconds]
    assert totals == sorted(totals, reverse=True)
    with pytest.raises(ConfigError, match="spans from the topology"):
        sparse_cost(CSAConfig(degrees=(1, 2), spans=(64,)), machine, **HEADS)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_measured_copies_calls_and_merges_are_counted_as_the_planner_does(transport):
    slow = ROUND.replace(copy_s=1e-9, call_s=3e-5, merge_s=2e-9, peak_flops_per_s=1e11)
    machine, new, sp = slow.sp_machine(4, 3), 24_000, 3
    shape = StepShape(
        queries=(new // sp,) * sp,
        keys=(new // sp,) * sp,
        pairs=((int(causal_pairs(range(new)) / sp / sp),) * sp,) * sp,
        calls=((2, 2, 2),) * 3,
        partial_rows=((8000,) * 3,) * 3,
        **HEADS,
    )
    planned = estimate(transport, shape, machine, overlap=False)
    (cost,) = transport_costs([transport], machine, **HEADS)
    priced = cost.seconds(causal_pairs(range(new)), new, new, slow, pipelined=False)
    assert priced.comm_s == pytest.approx(planned.comm_s)
    assert priced.compute_s + priced.merge_s == pytest.approx(planned.compute_s, rel=1e-3)
    plain = slow.replace(copy_s=0.0, call_s=0.0, merge_s=0.0)
    (cheap,) = transport_costs([transport], plain.sp_machine(4, 3), **HEADS)
    less = cheap.seconds(causal_pairs(range(new)), new, new, plain, pipelined=False)
    assert less.compute_s < priced.compute_s


def test_given_spans_are_priced_at_the_one_length_that_is_asked_for():
    csa = CSAConfig(degrees=(1, 4), spans=(1024,))
    length = 8191
    alone, two = (
        sparse_cost(csa, machine, **HEADS, length=length).forced("gather")
        for machine in (ROUND.sp_machine(1, 1), ROUND.sp_machine(4, 2))
    )
    prompt = [Prompt(start=0, end=length)]
    one = alone.seconds(prompt, ROUND, pipelined=False)
    both = two.seconds(prompt, ROUND, pipelined=False)
    # The second rank has more far keys to look at than the first: half of the work is the least it
    # has.
    assert 0.5 < both.compute_s / one.compute_s < 0.8
    dense_s = 4.0 * 128 * 8 * causal_pairs(range(length)) / ROUND.attention_flops_per_s
    assert 0.3 < one.compute_s / dense_s < 0.5
    with pytest.raises(ConfigError, match="'pigeon'"):
        two.forced("pigeon")
