"""Single terms: products, attention, collectives; against numbers worked out by hand."""

from __future__ import annotations

import pytest

from sps2_mega.simulator.collectives import all_reduce_s, all_to_all_s
from sps2_mega.simulator.compute import attention_s, gemm_s, kv_read_s
from sps2_mega.simulator.model_size import model_size
from sps2_mega.simulator.prompt import Prompt
from tests.simulator.small_model import MODEL, ROUND


def test_a_product_takes_its_arithmetic_or_the_reading_of_its_weights():
    assert gemm_s(1, 1e6, 2e6, ROUND) == pytest.approx(2e-6)
    assert gemm_s(1000, 1e6, 2e6, ROUND) == pytest.approx(2e-5)
    assert gemm_s(0, 1e6, 2e6, ROUND) == 0.0


def test_attention_takes_its_arithmetic_or_the_reading_of_its_keys():
    assert attention_s(1e6, 128, 0.0, ROUND) == pytest.approx(4 * 128e6 / 5e13)
    assert attention_s(1, 128, 1e9, ROUND) == pytest.approx(1e-3)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 63), (17, 63), (63, 63)])
def test_a_prompt_counts_each_new_token_with_itself_and_all_before(start, end):
    prompt = Prompt(start=start, end=end)
    assert prompt.pairs == sum(range(start + 1, end + 1))
    assert prompt.num_new == end - start


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
