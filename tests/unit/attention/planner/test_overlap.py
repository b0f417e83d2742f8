"""The overlap of one layer against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from sps2_mega.attention.pipeline.micro_batches import Cut
from sps2_mega.attention.planner.overlap import (
    NO_TRAVEL,
    WHOLE,
    TravelSeconds,
    cut_s,
    exact_layer,
    exchanges_s,
    level_layer,
    ring_s,
)


def layer_s(cut, window=1, **seconds):
    compute_s = seconds.pop("compute_s")
    return cut_s(cut, window, replace(NO_TRAVEL, **seconds), compute_s)


def test_without_micro_batches_nothing_overlaps():
    whole = Cut(head_groups=1, query_parts=1)
    assert layer_s(whole, keys_s=0.5, queries_s=0.5, compute_s=2.0, results_s=3.0) == 6.0


def test_micro_batches_hide_all_but_the_ends():
    quarters = Cut(head_groups=4, query_parts=1)
    # 1 in, 4 x 2 of computing, 1 back.
    assert layer_s(quarters, keys_s=4.0, compute_s=8.0, results_s=4.0) == 10.0
    # Links are the slower ones: 4 x 2 in, then one computation.
    assert layer_s(quarters, keys_s=8.0, compute_s=4.0) == 9.0
    # Both directions share a link: 8 in and 4 back.
    assert layer_s(quarters, queries_s=8.0, compute_s=4.0, results_s=4.0) == 12.0


def test_keys_come_with_the_first_queries_of_their_heads():
    # All of them before anything is computed, then 4 x 1.
    assert layer_s(Cut(head_groups=1, query_parts=4), keys_s=4.0, compute_s=4.0) == 8.0
    # The keys of the second half need 2, and one micro-batch computes only 1: looking further ahead
    # hides them.
    halves = Cut(head_groups=2, query_parts=2)
    assert layer_s(halves, 1, keys_s=4.0, compute_s=4.0) == 2.0 + 2.0 + 1.0 + 2.0
    assert layer_s(halves, 4, keys_s=4.0, compute_s=4.0) == 2.0 + 4.0


def test_own_keys_hide_what_comes_from_others():
    assert exchanges_s(3.0, [1.0, 1.0], [1.0, 1.0]) == 5.0
    assert exchanges_s(1.0, [3.0], [2.0]) == 5.0
    # Two exchanges are on their way; the third is posted when the first has been computed with.
    assert exchanges_s(0.5, [1.0] * 3, [4.0] * 3) == 13.0
    assert exchanges_s(2.0, [], []) == 2.0


@pytest.mark.parametrize("hop", [0.0, 0.4, 1.0, 3.0])
def test_a_ring_steps_at_the_pace_of_the_slower_one(hop):
    compute = [1.0] * 5
    assert ring_s(hop, compute) == pytest.approx(4 * max(hop, 1.0) + 1.0)
    assert ring_s(hop, [1.0]) == 1.0


def test_more_overlap_never_takes_longer():
    times = [
        layer_s(
            Cut(head_groups=m, query_parts=1),
            keys_s=4.0,
            queries_s=4.0,
            compute_s=6.0,
            results_s=2.0,
        )
        for m in (1, 2, 3, 5, 8)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(times))
    assert math.isclose(times[0], 16.0)
    assert times[-1] >= 10.0


@pytest.mark.parametrize("transport", ["gather", "ring", "ulysses", "pass_q"])
def test_latencies_between_cpus_are_never_hidden(transport):
    """A second for each message, two groups of heads times two parts of queries."""
    cut = WHOLE if transport == "ring" else Cut(head_groups=2, query_parts=2)
    travel = TravelSeconds(keys_s=4.0, queries_s=2.0, results_s=2.0)
    messages = TravelSeconds(keys_s=1.0, queries_s=1.0, results_s=1.0)
    compute_s = [50.0, 50.0] if transport == "ring" else [100.0]
    cpu, gpu = (
        exact_layer(transport, cut, travel, messages, compute_s, on_cpu=on_cpu, pipelined=True)
        for on_cpu in (True, False)
    )
    latency_s = 3.0 if transport == "ring" else 2.0 + 4.0 + 4.0
    silent = exact_layer(transport, cut, travel, NO_TRAVEL, compute_s, on_cpu=True, pipelined=True)
    assert cpu.total_s == silent.total_s + latency_s
    assert cpu.comm_s == gpu.comm_s == 8.0 + latency_s
    assert silent.total_s <= gpu.total_s < cpu.total_s
    assert gpu.hidden_s + gpu.exposed_s == pytest.approx(gpu.comm_s)
    apart = exact_layer(transport, cut, travel, messages, compute_s, on_cpu=True, pipelined=False)
    assert apart.total_s == 100.0 + 8.0 + latency_s and apart.hidden_s == 0.0


def test_exchanges_by_level_hide_behind_own_keys_and_each_other():
    def layer(**changes):
        given = dict(own_s=1.0, far_s=4.0, travel_s=4.0, latency_s=0.5, parts=4, on_cpu=True)
        return level_layer(**(given | changes))

    # The first quarter has come when the own keys are done with; the others hide behind it.
    assert layer().total_s == 0.5 + 1.0 + 4.0
    assert layer(parts=1).total_s == 0.5 + 4.0 + 4.0
    assert layer(on_cpu=False, parts=1).total_s == 4.5 + 4.0
    assert layer(parts=None).total_s == 0.5 + 4.0 + 5.0
    assert layer().exposed_s == 0.5 and layer().comm_s == 4.5
