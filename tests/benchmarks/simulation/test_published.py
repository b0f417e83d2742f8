"""The cost model against published measurements, and the document that says so."""

from __future__ import annotations

import pytest

from benchmarks import validate_simulator
from benchmarks.simulation.fitting import fitted
from benchmarks.simulation.published import LLAMA_405B, PUBLISHED, compare
from sps2_mega.simulator.collectives import all_reduce_s
from sps2_mega.simulator.hardware import load_hardware

META = load_hardware("h100-meta")


def name_of(found):
    return f"{found.published.kind}-{found.published.label}"


@pytest.mark.parametrize(
    "found", [c for c in compare(META) if not c.published.known_gap], ids=name_of
)
def test_published_seconds_are_met_within_a_tenth(found):
    assert abs(found.error) <= 0.10


def test_known_gaps_are_few_and_err_on_the_fast_side():
    gaps = [found for found in compare(META) if found.published.known_gap]
    assert len(gaps) <= 3
    assert all(-0.4 < found.error < -0.10 for found in gaps)


def test_two_constants_are_fitted_and_the_files_hold_them():
    assert {row.fitted_to for row in PUBLISHED} == {"", "gemm_efficiency", "latency_s"}
    efficiency, latency_s = fitted(META)
    assert META.gemm_efficiency == pytest.approx(efficiency, abs=0.0011)
    assert META.inter_node.latency_s == pytest.approx(latency_s, abs=1.1e-6)
    # Where the search begins does not matter.
    far = META.replace(gemm_efficiency=0.3)
    assert fitted(far) == (efficiency, latency_s)


def test_the_embeddings_sum_is_counted_and_no_constant_would_do_better():
    (tp32,) = [c for c in compare(META, "gemm_efficiency") if c.published.tp == 32]
    one = all_reduce_s(128_000 * LLAMA_405B.hidden_size * 2, 32, META)
    assert tp32.terms["tp_all_reduce"] == pytest.approx((2 * LLAMA_405B.num_layers + 1) * one)
    worst = max(abs(c.error) for c in compare(META, "gemm_efficiency"))
    for other in (META.gemm_efficiency - 0.02, META.gemm_efficiency + 0.02):
        errors = compare(META.replace(gemm_efficiency=other), "gemm_efficiency")
        assert max(abs(c.error) for c in errors) > worst


def test_more_tensor_parallelism_makes_decode_slower_over_nodes_as_published():
    rows = [c for c in compare(META) if c.published.kind == "decode" and c.published.sp == 1]
    steps = {c.published.tp: c.seconds for c in rows}
    assert steps[16] < steps[8] < steps[32]


def test_the_table_in_the_document_is_current():
    text = validate_simulator.DOCUMENT.read_text()
    written = validate_simulator.document_with(text, validate_simulator.table())
    assert written == text, "run: python benchmarks/validate_simulator.py"
