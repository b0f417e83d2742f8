"""Transports of sparse prefill: counts against the definition, choices in plain cases."""

import itertools

import pytest
import torch
from rank_threads import RankThreads

from sps2_mega.attention.csa.pattern import CSAPattern, tail_starts
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.levels import transport as by_levels
from sps2_mega.attention.pipeline.executor import plain_pipeline
from sps2_mega.attention.planner.by_level import CANDIDATES, choose_levels, level_costs
from sps2_mega.attention.planner.link_time import link_seconds
from sps2_mega.attention.planner.visible_rows import visible_between
from sps2_mega.attention.transports.base import SoftmaxParams
from sps2_mega.parallel.machine import Link, Machine

BLOCK, KV_HEADS = 4, range(2, 5)


def csa(**changes):
    given = dict(
        degrees=(1, 3), spans=(16,), sinks=2, halo=3, tail=5, sample_queries=False, block=1
    )
    return CSAPattern(**(given | changes))


def layout_of(ranks, ends, starts=None):
    return build_layout(ranks, ends, starts=starts, block_size=BLOCK, sp_size=4)


@pytest.mark.parametrize(
    "pattern", [csa(), csa(block=4), csa(degrees=(1, 2), sample_queries=True), csa(degrees=(1, 1))]
)
def test_what_is_visible_between_ranks_is_counted_from_the_definition(pattern):
    lens, starts = (43, 21, 30), (0, 0, 12)
    ranks = [[0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 0], [2] * 6, [3, 3, 0, 0, 1, 1, 1, 2]]
    layout = layout_of(ranks, lens, starts)
    tails = tail_starts([pattern] * 3, lens)
    found = visible_between(layout, [pattern] * 3, tails, KV_HEADS)
    pairs, keys, queries = {}, {}, {}
    for s, (length, start) in enumerate(zip(lens, starts, strict=True)):
        for i in range(start, min(length, tails[s])):
            for j in range(i + 1):
                between = ranks[s][i // BLOCK], ranks[s][j // BLOCK]
                for head in KV_HEADS:
                    if pattern.sees(i, j, kv_head=head, layer=0, prompt_len=length):
                        pairs[between] = pairs.get(between, 0) + 1
                        keys.setdefault(between, set()).add((s, j, head))
                        queries.setdefault(between, set()).add((s, i, head))
    assert {between: pair.pairs for between, pair in found.items()} == pairs
    for between, pair in found.items():
        # Keys of several runs of queries are counted for each of them.
        assert pair.key_rows >= len(keys[between])
        assert pair.query_rows >= len(queries[between])


def choose(visible, bandwidth, *, flops=1e11, parts=8, levels=(4,), num_heads=12, **more):
    machine = Machine(
        sp_levels=levels,
        links=tuple(Link(latency_s=1e-6, bytes_per_s=b) for b in bandwidth),
        flops_per_s=flops,
        **more,
    )
    return choose_levels(
        visible,
        machine,
        num_heads=num_heads,
        num_kv_heads=3,
        head_dim=64,
        itemsize=2,
        parts=parts,
    )


def whole_prompt(pattern, tokens=4000):
    ranks = [[block * 4 // (tokens // BLOCK) for block in range(tokens // BLOCK)]]
    layout = layout_of(ranks, [tokens])
    return visible_between(layout, [pattern], tail_starts([pattern], [tokens]), KV_HEADS)


def test_few_keys_come_to_the_queries_over_a_slow_link():
    visible = whole_prompt(csa(degrees=(1, 64), spans=(1000,)))
    assert choose(visible, [1e6]).transports == ("gather",)


def test_a_free_link_buys_balance():
    """The last of four contiguous ranks sees all keys, the first only its own."""
    visible = whole_prompt(csa(degrees=(1, 2), spans=(1000,)))
    choice = choose(visible, [1e15])
    assert choice.transports == ("ulysses",)
    assert choice.seconds["ulysses",] < 0.8 * choice.seconds["gather",]


def test_balance_buys_less_where_ranks_share_cores():
    """On half as many cores as ranks, the rank with most to do has a whole core in the end."""
    visible = whole_prompt(csa(degrees=(1, 2), spans=(1000,)))
    own, shared = (choose(visible, [1e15], ranks_per_core=ranks).seconds for ranks in (1.0, 2.0))
    assert shared["ulysses",] == pytest.approx(own["ulysses",], rel=0.05)
    assert shared["gather",] == pytest.approx(shared["ulysses",], rel=0.1)
    assert shared["gather",] < own["gather",]


def test_few_queries_go_to_a_long_cached_prefix():
    pattern = csa(degrees=(1, 2), spans=(1000,), tail=0)
    ranks = [[block * 4 // 1000 for block in range(1000)] + [3] * 5]
    layout = layout_of(ranks, [4020], [4000])
    visible = visible_between(layout, [pattern], [4020], KV_HEADS)
    choice = choose(visible, [1e7])
    assert choice.transports == ("pass_q",)
    assert "pass_q" not in choice.reason and "gather" in choice.reason


def test_levels_are_chosen_for_their_own_links():
    visible = whole_prompt(csa(degrees=(1, 64), spans=(1000,)))
    choice = choose(visible, [1e15, 1e6], levels=(2, 2))
    assert choice.transports[1] == "gather" and len(choice.seconds) == 9


def test_without_overlap_communication_adds_up():
    visible = whole_prompt(csa())
    hidden, added = (choose(visible, [1e8], parts=parts) for parts in (8, None))
    assert all(hidden.seconds[names] < added.seconds[names] for names in hidden.seconds)


def test_nothing_visible_costs_latency_only():
    assert max(choose({}, [1e9]).seconds.values()) < 1e-4


def test_each_part_of_a_level_costs_what_an_empty_one_took():
    machine = Machine(
        sp_levels=(2, 2),
        links=(Link(latency_s=9.0, bytes_per_s=1e9),) * 2,
        flops_per_s=1e11,
        work_s={"gather": 1.0, "ulysses": 3.0},
    )
    seconds = choose_levels(
        {}, machine, num_heads=6, num_kv_heads=3, head_dim=64, itemsize=2, parts=2
    ).seconds
    assert seconds["gather", "gather"] == 2 * (1 + 1)
    assert seconds["gather", "ulysses"] == 2 * (1 + 3)
    assert seconds["pass_q", "gather"] == 2 * (2 * 9 + 1)  # two messages, as nothing was measured


def test_own_keys_and_parts_hide_what_travels_and_parts_pay_latencies():
    visible = whole_prompt(csa(degrees=(1, 4), spans=(1000,)))
    apart, whole, cut, torn = (
        choose(visible, [3e7], parts=parts).seconds["gather",] for parts in (None, 1, 4, 10**4)
    )
    machine = Machine(
        sp_levels=(4,), links=(Link(latency_s=1e-6, bytes_per_s=3e7),), flops_per_s=1e11
    )
    cost = level_costs(visible, machine, num_heads=12, num_kv_heads=3, head_dim=64, itemsize=2)[
        "gather",
    ]
    assert 0 < cost.own_s < cost.compute_s and cost.latency_s == 1e-6
    far_s = cost.compute_s - cost.own_s
    assert apart == pytest.approx(cost.travel_s + cost.compute_s + 1e-6)
    assert whole == pytest.approx(max(cost.own_s, cost.travel_s) + far_s + 1e-6)
    assert cost.own_s < cost.travel_s
    assert whole / 2 < cut < whole
    # Nothing but latencies is added to the longer of the two.
    assert torn == pytest.approx(0.01 + max(cost.compute_s, cost.travel_s), rel=0.01)


class CountedThreads(RankThreads):
    """Keeps how much went from whom to whom."""

    def __init__(self, size):
        super().__init__(size)
        self.moved = [[0] * size for _ in range(size)]

    def post_all_to_all(self, x, send_sizes, receive_sizes, group):
        for target, count in enumerate(send_sizes):
            self.moved[group.rank][target] += count * x.itemsize * (target != group.rank)
        return super().post_all_to_all(x, send_sizes, receive_sizes, group)


@pytest.mark.parametrize("names", list(itertools.product(CANDIDATES, repeat=2)), ids=",".join)
def test_bytes_are_those_that_travel(names, monkeypatch):
    """Two nodes of two ranks, a cell each, 4 KV heads of 8; exact without halo and sinks."""
    tokens, kv_heads, levels = 96, 4, (2, 2)
    pattern = csa(spans=(24,), sinks=0, halo=0, tail=0, degrees=(1, 2))
    layout = layout_of([[block // 6 for block in range(24)]], [tokens])
    threads = CountedThreads(4)
    monkeypatch.setattr(by_levels, "post_all_to_all", threads.post_all_to_all)

    def on_rank(group):
        transport = by_levels.HierarchicalTransport(
            layout,
            [pattern],
            [tokens],
            names,
            levels,
            kv_heads=range(kv_heads),
            group=group,
            device=torch.device("cpu"),
            pipeline=plain_pipeline(torch.device("cpu")),
        )
        q, k, v = (torch.randn(24, heads, 8) for heads in (8, kv_heads, kv_heads))
        return transport.attend(0, q, k, v, SoftmaxParams(1.0))

    assert [out.shape for out in threads.run(on_rank)] == [(24, 8, 8)] * 4
    machine = Machine(
        sp_levels=levels,
        links=(Link(latency_s=0.0, bytes_per_s=50.0), Link(latency_s=0.0, bytes_per_s=1.0)),
        flops_per_s=1e30,
    )
    choice = choose_levels(
        visible_between(layout, [pattern], [tokens], range(kv_heads)),
        machine,
        num_heads=8,
        num_kv_heads=kv_heads,
        head_dim=8,
        itemsize=4,
        parts=None,
    )
    assert choice.seconds[names] == pytest.approx(link_seconds(threads.moved, machine))
