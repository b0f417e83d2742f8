"""Stored comparisons and the tables made of them."""

from __future__ import annotations

import json

import pytest

from benchmarks.simulation import claims, results
from sps2_mega.config import CSAConfig
from sps2_mega.simulator.comparison.setting import Outcome, layout_of
from sps2_mega.simulator.system import System


def outcome(name, ttft, rate=1.0, **changes):
    figures = {
        "ttft_s": {"mean": ttft},
        "tbt_s": {"mean": 0.01},
        "response_s": None,
        "prefill_rate": 1000.0 / ttft,
        "decode_rate": 0.0,
    }
    return Outcome(system=System(name=name, **changes), rate=rate, figures=figures, wall_s=1.0)


def test_an_outcome_comes_back_from_json():
    sparse = outcome("sps2-csa", 2.0, sp=8, csa=CSAConfig(degrees=(1, 4)), transports=("ring",))
    assert Outcome.from_json(json.loads(json.dumps(sparse.as_json()))) == sparse


def test_the_summary_names_the_best_and_keeps_the_losses():
    stored = [
        ("here", [outcome("sarathi", 4.0), outcome("sps2", 1.0)]),
        ("there", [outcome("sarathi", 1.0), outcome("sps2", 2.0), outcome("sps2-csa", 1.0)]),
    ]
    line = next(text for text in results.summary(stored).splitlines() if "| TTFT |" in text)
    assert line == "| TTFT | 7.5x | sarathi | 4.00x | 1.00x | 0.50x | here, rate 1, sps2 |"
    assert "response" not in results.summary(stored), "nothing was measured"
    assert "prefill throughput | 8.2x | sarathi | 4.00x" in results.summary(stored)


def test_the_tables_in_the_documents_are_current():
    again = "run: python -m benchmarks.simulation.results"
    text = results.DOCUMENT.read_text()
    assert results.written(text) == text, again
    assert results.every_setting() == results.EVERY.read_text(), again


def test_claims_stand_beside_what_was_simulated_and_measured(tmp_path):
    stored = [
        ("here", [outcome("sarathi", 8.0), outcome("sarathi-wide", 9.0), outcome("sps2", 1.0)]),
        ("there", [outcome("sarathi", 1.0), outcome("sps2", 2.0), outcome("sps2-csa", 1.0)]),
    ]
    ttft, tbt, response, prefill, decode = claims.table(stored, tmp_path).splitlines()[2:]
    assert ttft.startswith(
        "| TTFT 7.5x | up to 8.00x (here, rate 1, sps2); middle of 3 1.00x, least 0.50x, 1 reach "
        "the claim. "
        "Over one engine across all GPUs up to 9.00x (here, rate 1, sps2) | not measured yet | "
        "All GPUs"
    )
    assert "| not simulated | not measured yet |" in response and "| not simulated |" in decode
    spread = {"mean": 2.0, "p50": 1.0, "p99": 3.0}
    runs = [
        {"rate": "1gbit", "slice": n, "system": name, "figures": {"ttft_s": spread | {"mean": s}}}
        for name, seconds in (("sarathi", (6.0, 3.0)), ("sps2", (2.0, 2.0)))
        for n, s in enumerate(seconds)
    ]
    (tmp_path / "replay.json").write_text(json.dumps({"runs": runs}))
    seconds = {"tp-chunked-512": 4.0, "tp": 9.0, "ring": 2.0, "csa": 1.0, "alone": 0.1}
    curves = {
        name: {"10gbit": {"ttft_s": s}, "1gbit": {"ttft_s": s}, "9mbit": {"ttft_s": 2 * s}}
        for name, s in seconds.items()
    }
    run = {"shape": "gqa", "tokens": 77, "curves": curves}
    (tmp_path / "cluster.json").write_text(json.dumps({"runs": [run]}))
    ttft, tbt, response, prefill, decode = claims.table(stored, tmp_path).splitlines()[2:]
    assert (
        "| trace at 1gbit, sps2 2.25x (1.50-3.00); one prompt of 77 tokens, gqa at 10gbit" in ttft
    )
    assert "gqa at 9mbit, exact 2.00x, CSA 4.00x | Exact attention" in prefill
    assert "trace" not in prefill and "| not measured yet |" in tbt


def test_both_baselines_have_rows_where_they_were_simulated():
    outcomes = [outcome("sarathi", 4.0), outcome("sarathi-wide", 8.0), outcome("sps2", 1.0)]
    rows = results.ratio_table([("here", outcomes)]).splitlines()
    assert rows[2].startswith("| here | 1 | sps2 | sarathi | 4.00x | 1.00x |  |")
    assert rows[3].startswith("| here | 1 | sps2 | sarathi-wide | 8.00x |") and len(rows) == 4


def test_a_document_without_markers_is_refused():
    with pytest.raises(SystemExit, match="needs the lines"):
        results.written("nothing")


def test_layouts_are_shown_in_a_few_characters():
    split = System(name="x", tp=2, sp=4, decode_replicas=1, decode_tp=8)
    assert layout_of(split) == "1 x tp2 sp4 + 1 x tp8"
    chunked = System(name="x", policy="sarathi", tp=16, dcp=2, chunk_tokens=512)
    assert layout_of(chunked) == "1 x tp16 dcp2, chunks of 512"
