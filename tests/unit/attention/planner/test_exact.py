import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.planner.exact import TRANSPORTS, choose, estimate
from sps2_mega.attention.planner.link_time import link_seconds
from sps2_mega.attention.planner.step_shape import step_shape
from sps2_mega.attention.planner.traffic import bytes_moved
from sps2_mega.parallel.machine import Link, Machine


def shape_of(ranks, *, tokens, start=0, sp=2, heads=8, kv_heads=8, width=64, itemsize=2):
    layout = build_layout(
        [ranks], [tokens], starts=[start], block_size=tokens // len(ranks), sp_size=sp
    )
    return step_shape(
        layout, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, itemsize=itemsize
    )


def machine(*, levels=(2,), rates=(1e9,), latency=0.0, flops=1e12):
    links = tuple(Link(latency_s=latency, bytes_per_s=rate) for rate in rates)
    return Machine(sp_levels=levels, links=links, flops_per_s=flops)


def sent(name, shape):
    return [sum(row) for row in bytes_moved(name, shape)]


@pytest.mark.parametrize("sp", [2, 4])
def test_equal_shares_cost_what_the_formulas_say(sp):
    tokens, heads, kv_heads, width, item = 64 * sp, 8, 4, 64, 2
    shape = shape_of(list(range(sp)), tokens=tokens, sp=sp, kv_heads=kv_heads)
    others = sp - 1
    kv = 2 * tokens * kv_heads * width * item * others // sp
    assert sent("gather", shape) == sent("ring", shape) == [kv] * sp
    ulysses = tokens // sp * (2 * heads + 2 * kv_heads) * width * item * others // sp
    assert sent("ulysses", shape) == [ulysses] * sp
    pass_q = tokens * heads * (2 * width * item + 4) * others // sp
    assert sent("pass_q", shape) == [pass_q] * sp


def test_more_ranks_than_kv_heads_send_each_rank_its_own_copy():
    shape = shape_of([0, 1, 2, 3], tokens=64, sp=4, kv_heads=2)
    expected = 16 * (2 * 8 + 2 * 4) * 64 * 2 * 3 // 4
    assert sent("ulysses", shape) == [expected] * 4


def test_seconds_by_hand():
    """2 ranks with 4 tokens each, 2 heads of width 8, 4 bytes, 1000 bytes/s, 10 ms, 1280 FLOP/s."""
    shape = shape_of([0, 1], tokens=8, heads=2, kv_heads=1, width=8, itemsize=4)
    assert shape.pairs == ((10, 0), (16, 10))
    found = {
        name: estimate(
            name, shape, machine(rates=(1000.0,), latency=0.01, flops=1280.0), overlap=False
        )
        for name in TRANSPORTS
    }
    # One KV head for two ranks: each gets its own copy. Keys 4*2*1, queries 4*1, outputs 4*1 rows
    # of 32 B.
    assert found["ulysses"].bytes_sent == (16 * 32,) * 2
    assert found["ulysses"].seconds == pytest.approx(0.03 + 0.512 + 36 * 32 / 1280)
    assert found["gather"].bytes_sent == (4 * 2 * 32,) * 2
    assert found["gather"].seconds == pytest.approx(0.02 + 0.256 + 52 * 32 / 1280)
    # With overlap it computes on its own 10 pairs (of two heads) while keys come in, then rank 1 on
    # 16.
    assert found["ring"].seconds == pytest.approx(0.266 + 52 * 32 / 1280)
    slow = machine(rates=(1000.0,), latency=0.01, flops=1280.0)
    overlapped = estimate("ring", shape, slow)
    assert overlapped.seconds == pytest.approx(0.01 + max(0.256, 20 * 32 / 1280) + 32 * 32 / 1280)
    assert estimate("gather", shape, slow).micro_batches == 1  # too little to cut
    assert found["pass_q"].bytes_sent == (4 * 2 * 32 + 4 * 2 * 36,) * 2
    assert found["pass_q"].seconds == pytest.approx(0.02 + 0.544 + 52 * 32 / 1280)


def test_calls_and_merges_are_part_of_the_price():
    """A second for a call and for merging the 4 x 2 x 8 numbers of one rank's queries."""
    shape = shape_of([0, 1], tokens=8, heads=2, kv_heads=1, width=8, itemsize=4)
    free = machine(rates=(1000.0,), latency=0.01, flops=1280.0)
    priced = dataclasses.replace(free, call_s=1.0, merge_s=1 / 64)
    for name, fixed in (("ulysses", 1), ("gather", 1), ("ring", 2 + 2), ("pass_q", 2 + 2)):
        before, after = (estimate(name, shape, m, overlap=False) for m in (free, priced))
        assert after.seconds == pytest.approx(before.seconds + fixed)
    # With overlap each of the ring's two steps pays one of both.
    assert estimate("ring", shape, priced).seconds == pytest.approx(5.3 + 0.01)


def test_halves_of_a_zigzag_are_calls_of_their_own():
    """Rank 0 has the first and the last 2 of 8 tokens; its first see no key of rank 1."""
    shape = shape_of([0, 1, 1, 0], tokens=8, heads=2, kv_heads=1, width=8, itemsize=4)
    free = machine(rates=(1000.0,), latency=0.01, flops=1280.0)
    priced = dataclasses.replace(free, call_s=1.0, merge_s=1 / 16)
    # Own keys: 3 pairs of halves for rank 0, 1 for rank 1; other keys: 1 and 1. Rows merged: 2 + 2
    # + 2 and 4, 2 and 4.
    for name, fixed in (("ring", 3 + 1 + 6 + 4), ("pass_q", 3 + 1 + 6 + 4), ("gather", 1)):
        before, after = (estimate(name, shape, m, overlap=False) for m in (free, priced))
        assert after.seconds == pytest.approx(before.seconds + fixed), name


def test_gathers_of_the_library_cost_what_was_measured():
    shape = shape_of([0, 1, 2, 3], tokens=64, sp=4)
    plain = machine(levels=(4,), latency=1.0)
    measured = dataclasses.replace(plain, gather_s=1.5)
    for name, before, after in (
        ("gather", 4, 3.0),
        ("ring", 3, 3),
        ("ulysses", 3, 3),
        ("pass_q", 4, 2.5),
    ):
        found = [estimate(name, shape, m, overlap=False).seconds for m in (plain, measured)]
        assert found[1] - found[0] == pytest.approx(after - before), name


def test_what_a_short_layer_took_stands_for_latencies_and_calls():
    shape = shape_of([0, 1, 1, 0], tokens=4096)
    plain = dataclasses.replace(machine(rates=(1e8,), latency=1.0, flops=1e11), call_s=1.0)
    measured = dataclasses.replace(plain, layer_s={"ulysses": (0.25, 0.5), "gather": (0.125, 1.0)})
    free = machine(rates=(1e8,), flops=1e11)
    for name, (few, many) in measured.layer_s.items():
        found = estimate(name, shape, measured)
        assert found.micro_batches > 1
        added = many + (found.micro_batches - 1) * few
        expected = estimate(name, shape, free).seconds + added
        assert found.seconds == pytest.approx(expected)
    # Of transports that were not measured nothing changes, and one rank has no exchange to pay.
    assert estimate("ring", shape, measured) == estimate("ring", shape, plain)
    alone = shape_of([0], tokens=64, sp=1)
    assert estimate("ulysses", alone, measured) == estimate("ulysses", alone, plain)


@pytest.mark.parametrize(("tokens", "beside"), [(1, 1), (2, 1), (65, 2), (128, 3), (500, 3)])
def test_what_a_layer_takes_beside_grows_between_the_measured_sizes(tokens, beside):
    shape = shape_of([0, 1], tokens=2 * tokens)
    free = machine(rates=(1e9,), flops=1e12)
    measured = dataclasses.replace(free, layer_s={"ring": (1.0, 3.0)})
    found = estimate("ring", shape, measured).seconds - estimate("ring", shape, free).seconds
    assert found == pytest.approx(beside, rel=1e-3)


def test_copies_are_part_of_the_price_and_on_cpu_those_through_the_kernel():
    """A millisecond to copy a number; a CPU copies sent and received numbers twice."""
    shape = shape_of([0, 1], tokens=8, heads=2, kv_heads=1, width=8, itemsize=4)
    orders = {"ring": 64, "gather": 128, "ulysses": 3 * 128 + 128, "pass_q": 3 * 128}
    kernel = {"ring": 256, "gather": 256, "ulysses": 512, "pass_q": 544}
    for flops, travel in ((1280.0, 1), (1e15, 0)):
        free = machine(rates=(1000.0,), flops=flops)
        for name in TRANSPORTS:
            before, after = (
                estimate(name, shape, m, overlap=False)
                for m in (free, dataclasses.replace(free, copy_s=1e-3))
            )
            copied = orders[name] + travel * kernel[name]
            assert after.seconds == pytest.approx(before.seconds + copied * 1e-3)


def test_sockets_cost_what_was_measured():
    """The same step; a millisecond of a core for each byte that leaves while another one comes."""
    shape = shape_of([0, 1], tokens=8, heads=2, kv_heads=1, width=8, itemsize=4)
    for flops, on_cpu in ((1280.0, True), (1e15, False)):
        link = Link(latency_s=0.0, bytes_per_s=1000.0, core_s_per_byte=1e-3)
        measured = dataclasses.replace(machine(rates=(1000.0,), flops=flops), links=(link,))
        for name in TRANSPORTS:
            before = estimate(
                name, shape, machine(rates=(1000.0,), flops=flops), overlap=False
            ).seconds
            after = estimate(name, shape, measured, overlap=False)
            assert after.seconds == pytest.approx(before + on_cpu * 1e-3 * after.bytes_sent[0])


def test_the_pipeline_hides_all_but_one_micro_batch_of_the_shorter():
    shape = shape_of([0, 1, 1, 0], tokens=4096)
    for name, rate in itertools.product(("gather", "ulysses", "pass_q"), (1e7, 1e8, 1e9)):
        with_it = estimate(name, shape, machine(rates=(rate,), flops=1e11))
        without = estimate(name, shape, machine(rates=(rate,), flops=1e11), overlap=False)
        assert with_it.micro_batches > 1 == without.micro_batches
        assert without.seconds == pytest.approx(without.comm_s + without.compute_s)
        shorter, longer = sorted((with_it.comm_s, with_it.compute_s))
        assert longer <= with_it.seconds < without.seconds
        if name == "gather":  # parts alike, and nothing returns
            assert with_it.seconds == pytest.approx(longer + shorter / with_it.micro_batches)


def test_few_new_tokens_over_a_long_cached_prefix_move_their_queries():
    """DESIGN.md: pass-Q pays when T/S is below about K/N."""
    slow = machine(rates=(1e6,))
    short = shape_of([0, 1] * 32, tokens=4096, start=4000, heads=8, kv_heads=2)
    assert choose(short, slow).transport == "pass_q"
    fresh = shape_of([0, 1] * 32, tokens=4096, heads=8, kv_heads=2)
    assert choose(fresh, slow, ("gather", "pass_q")).transport == "gather"


def test_many_heads_prefer_ulysses_and_grouped_ones_pass_keys():
    slow = machine(levels=(4,), rates=(1e6,))
    equal = shape_of([0, 1, 2, 3, 3, 2, 1, 0], tokens=4096, sp=4, heads=32, kv_heads=32)
    assert choose(equal, slow).transport == "ulysses"
    grouped = shape_of([0, 1, 2, 3, 3, 2, 1, 0], tokens=4096, sp=4, heads=32, kv_heads=2)
    assert choose(grouped, slow).transport in ("gather", "ring")


def test_the_slowest_level_counts_and_a_node_shares_its_link():
    """Two nodes of two ranks; 800 bytes to everybody."""
    moved = [[0 if r == p else 800 for p in range(4)] for r in range(4)]
    # A rank sends 800 inside; a node sends 2 * 2 * 800 over a link that gives each of its ranks 100
    # B/s.
    assert link_seconds(moved, machine(levels=(2, 2), rates=(1e3, 100.0))) == 3200 / 200
    assert link_seconds(moved, machine(levels=(2, 2), rates=(1.0, 100.0))) == 800
    ring = [[800 if p == (r + 1) % 4 else 0 for p in range(4)] for r in range(4)]
    assert link_seconds(ring, machine(levels=(2, 2), rates=(1e3, 100.0))) == 800 / 200


def test_one_rank_moves_nothing():
    shape = shape_of([0], tokens=5, sp=1)
    chosen = choose(shape, machine(levels=(1,)))
    assert chosen.transport == "ulysses"
    assert all(e.bytes_sent == (0,) and e.messages == 0 for e in chosen.estimates)


def test_the_reason_names_the_alternatives():
    chosen = choose(shape_of([0, 1], tokens=64), machine(), ("gather", "ulysses"))
    assert chosen.transport == "ulysses"
    assert "gather" in chosen.reason and "MB" in chosen.reason


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=9),
    st.integers(0, 36),
    st.sampled_from([(1, 1), (6, 3), (5, 1), (8, 8)]),
)
def test_any_layout_has_finite_estimates_and_a_least_one(ranks, start, heads):
    tokens = 4 * len(ranks)
    shape = shape_of(
        ranks, tokens=tokens, start=min(start, tokens - 1), sp=4, heads=heads[0], kv_heads=heads[1]
    )
    chosen = choose(shape, machine(levels=(2, 2), rates=(1e9, 1e8), latency=1e-5))
    assert chosen.estimates[0].transport == chosen.transport
    seconds = [found.seconds for found in chosen.estimates]
    assert seconds == sorted(seconds) and seconds[0] > 0
    everything = sum(map(sum, shape.pairs)) * heads[0]
    assert all(found.pairs * 4 >= everything for found in chosen.estimates)
