"""Single terms: products, attention, collectives, overlap; against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from sps2_mega.attention.pipeline.settings import Cut
from sps2_mega.attention.planner.overlap import cut_s, ring_s, works_s
from sps2_mega.simulator.collectives import all_reduce_s, all_to_all_s
from sps2_mega.simulator.compute import attention_s, causal_pairs, gemm_s, kv_read_s
from sps2_mega.simulator.model_size import model_size
from tests.unit.simulator.small_model import MODEL, ROUND


def test_a_product_takes_its_arithmetic_or_the_reading_of_its_weights():
    assert gemm_s(1, 1e6, 2e6, ROUND) == pytest.approx(2e-6)
    assert gemm_s(1000, 1e6, 2e6, ROUND) == pytest.approx(2e-5)
    assert gemm_s(0, 1e6, 2e6, ROUND) == 0.0


def test_attention_takes_its_arithmetic_or_the_reading_of_its_keys():
    assert attention_s(1e6, 128, 0.0, ROUND) == pytest.approx(4 * 128e6 / 5e13)
    assert attention_s(1, 128, 1e9, ROUND) == pytest.approx(1e-3)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 63), (17, 63), (63, 63)])
def test_causal_pairs_counts_each_query_with_itself_and_all_before(start, end):
    assert causal_pairs(start, end) == sum(range(start + 1, end + 1))


def test_model_size_counts_parameters_and_cache_bytes():
    size = model_size(MODEL)
    assert size.attention_params == 1024 * (2 * 1024 + 2 * 512)
    assert size.ffn_params == 3 * 1024 * 4096
    assert size.kv_bytes(1) == 2 * 4 * 128 * 2
    assert size.kv_bytes(8) == 2 * 128 * 2, "a KV head is not cut"
    assert model_size(MODEL, ffn_itemsize=1).layer_bytes == size.layer_bytes - size.ffn_params


def test_measured_small_sums_and_cache_reads_replace_what_is_assumed():
    measured = ROUND.replace(reduce_latency_s=0.5, kv_bytes_per_s=1e6)
    plain = ROUND.inter_node.latency_s * 2  # of three nodes
    assert all_reduce_s(1e6, 12, measured) - all_reduce_s(1e6, 12, ROUND) == pytest.approx(
        0.5 - plain
    )
    assert kv_read_s(1e6, measured) == pytest.approx(1.0)
    assert kv_read_s(1e6, ROUND) == pytest.approx(1e6 / ROUND.read_bytes_per_s)


def test_an_all_reduce_pays_latency_and_bytes_inside_and_between_nodes():
    assert all_reduce_s(1e6, 1, ROUND) == 0.0
    inside = 2e-5 + 1.5 * 1e6 / 1e11
    assert all_reduce_s(1e6, 4, ROUND) == pytest.approx(inside)
    assert all_reduce_s(1e6, 12, ROUND) == pytest.approx(
        inside + 2e-4 + 2 * (2 / 3) * 0.25e6 / 1e10
    )


def test_an_all_to_all_is_as_slow_as_its_slowest_level():
    assert all_to_all_s(1e6, ROUND.sp_machine(1, 1)) == 0.0
    assert all_to_all_s(1e6, ROUND.sp_machine(1, 4)) == pytest.approx(1e-5 + 1e-5)
    # 4 of 7 peers are on the other node.
    assert all_to_all_s(7e6, ROUND.sp_machine(1, 8)) == pytest.approx(1e-4 + 4e6 / 1e10)


def layer_s(cut, window=1, **seconds):
    return cut_s(cut, window, **dict(keys_s=0.0, queries_s=0.0, back_s=0.0) | seconds)


def test_without_micro_batches_nothing_overlaps():
    whole = Cut(head_groups=1, query_parts=1)
    assert layer_s(whole, keys_s=0.5, queries_s=0.5, compute_s=2.0, back_s=3.0) == 6.0


def test_micro_batches_hide_all_but_the_ends():
    quarters = Cut(head_groups=4, query_parts=1)
    # 1 in, 4 x 2 of computing, 1 back.
    assert layer_s(quarters, keys_s=4.0, compute_s=8.0, back_s=4.0) == 10.0
    # Links are the slower ones: 4 x 2 in, then one computation.
    assert layer_s(quarters, keys_s=8.0, compute_s=4.0) == 9.0
    # Both directions share a link: 8 in and 4 back.
    assert layer_s(quarters, queries_s=8.0, compute_s=4.0, back_s=4.0) == 12.0


def test_keys_come_with_the_first_queries_of_their_heads():
    # All of them before anything is computed, then 4 x 1.
    assert layer_s(Cut(head_groups=1, query_parts=4), keys_s=4.0, compute_s=4.0) == 8.0
    # The keys of the second half need 2, and one micro-batch computes only 1: looking further ahead
    # hides them.
    halves = Cut(head_groups=2, query_parts=2)
    assert layer_s(halves, 1, keys_s=4.0, compute_s=4.0) == 2.0 + 2.0 + 1.0 + 2.0
    assert layer_s(halves, 4, keys_s=4.0, compute_s=4.0) == 2.0 + 4.0


def test_own_keys_hide_what_comes_from_others():
    assert works_s(3.0, [1.0, 1.0], [1.0, 1.0]) == 5.0
    assert works_s(1.0, [3.0], [2.0]) == 5.0
    # Two exchanges are on their way; the third is posted when the first has been computed with.
    assert works_s(0.5, [1.0] * 3, [4.0] * 3) == 13.0
    assert works_s(2.0, [], []) == 2.0


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
            back_s=2.0,
        )
        for m in (1, 2, 3, 5, 8)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(times))
    assert math.isclose(times[0], 16.0)
    assert times[-1] >= 10.0
