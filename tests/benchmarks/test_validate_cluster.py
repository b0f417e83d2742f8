"""The simulator against the emulated cluster: pairs of systems, the machine's speed, the tables."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import validate_cluster
from benchmarks.calibration.file import hardware_text
from benchmarks.calibration.links import MeasuredLink
from benchmarks.emulated.hardware import Calibrated, Speeds, linked_at
from benchmarks.emulated.simulated import rows_of, times
from sps2_mega.errors import ConfigError
from tests.benchmarks.test_calibrate import TERMS

FAST = MeasuredLink(latency_s=1e-4, bytes_per_s=1e8)
SLOW = MeasuredLink(
    latency_s=1e-4, bytes_per_s=1e6, exchange_factor=2.0, stream_factor=1.5, reduce_factor=0.5
)
SYSTEMS = (
    "alone", "csa-alone", "tp", "tp-chunked-100", "ring", "ulysses", "ulysses-pipelined", "csa",
    "csa-pipelined",
)  # fmt: skip
RUN = {"shape": "gqa", "tokens": 1201, "decode": 3}
DOCUMENT = {"nodes": 2, "csa": {"degrees": "1,4", "cells": 8}}


@pytest.fixture
def folder(tmp_path):
    for ranks in (1, 2):
        terms = dataclasses.replace(
            TERMS, peak_flops_per_s=1e11, linear_flops_per_s=8e10, attention_flops_per_s=6e10,
            ranks=ranks, ranks_per_node=1, levels=(2,)[: ranks - 1], links=(FAST,)[: ranks - 1],
        )  # fmt: skip
        between = {"between-1gbit": FAST, "between-10mbit": SLOW} if ranks > 1 else None
        text = hardware_text(terms, model="gqa", command="x", date="today", between=between)
        alone = "-alone" if ranks == 1 else ""
        (tmp_path / f"calibrated-gqa-2{alone}.yaml").write_text(text)
    return tmp_path


def simulated(name, rate, folder, **changes):
    found = Calibrated.named("gqa", 2, folder)
    return times(DOCUMENT, RUN | changes, name, rate, found, speeds=Speeds())


def test_every_measured_system_has_a_simulated_one(folder):
    fast = {name: simulated(name, "1gbit", folder) for name in SYSTEMS}
    slow = {name: simulated(name, "10mbit", folder) for name in SYSTEMS}
    assert all(found["ttft"] > 0 and found["tbt"] > 0 for found in fast.values())
    for name in SYSTEMS:
        assert (slow[name]["ttft"] > fast[name]["ttft"]) == (not name.endswith("alone")), name
    assert all(slow[name]["tbt"] == fast[name]["tbt"] for name in SYSTEMS), "KBs pass at once"
    assert fast["csa-alone"]["ttft"] < fast["alone"]["ttft"]
    assert slow["ulysses-pipelined"]["ttft"] < slow["ulysses"]["ttft"]
    assert slow["csa"]["ttft"] < slow["tp"]["ttft"]
    assert simulated("ring", "1gbit", folder, decode=0)["tbt"] == 0.0


def test_a_rate_that_was_not_probed_is_told_from_the_nearest(folder):
    path = folder / "calibrated-gqa-2.yaml"
    assert linked_at(path, "20mbit").inter_node.bytes_per_s == pytest.approx(2e6)
    assert linked_at(path, "20mbit").exchange_factor == 2.0
    assert linked_at(path, "500mbit").inter_node.bytes_per_s == pytest.approx(5e7)
    with pytest.raises(ConfigError, match="no link of free"):
        linked_at(path, "free")


def measured(folder, slower):
    """A result file with the simulator's own figures, on a machine `slower` times as slow."""
    curves = {}
    for name in ("alone", "tp", "csa"):
        found = simulated(name, "1gbit", folder)
        point = {"ttft_s": found["ttft"] * slower, "tbt_s": found["tbt"] * slower}
        curves[name] = {"1gbit": point}
    return DOCUMENT | {"runs": [RUN | {"curves": curves}]}


def test_one_rank_alone_tells_the_machines_speed(folder):
    rows, speeds = rows_of(measured(folder, 2.0), folder)
    assert speeds == {
        "gqa, 1201 tokens, 1gbit, prefill": pytest.approx(0.5),
        "gqa, 1201 tokens, 1gbit, decode": pytest.approx(0.5),
    }
    errors = {(row.system, row.figure): row.error for row in rows}
    assert errors["alone", "ttft"] == errors["alone", "tbt"] == pytest.approx(0.0)
    assert -0.2 < errors["csa", "ttft"] < 0.0, "its link is not slower, all else is"
    assert -0.2 < errors["csa", "tbt"] < 0.0
    assert [row.calibrates for row in rows] == [row.system == "alone" for row in rows]


def test_prefill_and_decode_have_speeds_of_their_own(folder):
    document = measured(folder, 1.0)
    for found in document["runs"][0]["curves"].values():
        found["1gbit"]["tbt_s"] *= 1.25
    rows, speeds = rows_of(document, folder)
    assert [round(speed, 3) for speed in speeds.values()] == [1.0, 0.8]
    assert all(row.error == pytest.approx(0.0) for row in rows if row.figure == "ttft")
    without = measured(folder, 1.0)
    for found in without["runs"][0]["curves"].values():
        del found["1gbit"]["tbt_s"]
    assert {row.figure for row in rows_of(without, folder)[0]} == {"ttft"}


def test_a_missing_calibration_is_named(folder):
    with pytest.raises(ConfigError, match=r"calibrated-gqa-4-alone\.yaml is missing"):
        rows_of(measured(folder, 1.0) | {"nodes": 4}, folder)
    without = measured(folder, 1.0)
    del without["runs"][0]["curves"]["alone"]
    with pytest.raises(ConfigError, match="'alone'"):
        rows_of(without, folder)


def test_missing_calibrations_are_named_with_their_commands(folder, tmp_path, capsys):
    path = tmp_path / "cluster-x.json"
    runs = measured(folder, 1.0)["runs"]
    other = {**runs[0], "shape": "mha", "tokens": 77}
    path.write_text(json.dumps(measured(folder, 1.0) | {"runs": [*runs, other]}))
    assert validate_cluster.missing_calibrations([path], folder) == [
        "sudo python benchmarks/calibrate.py --nodes 2 --rates 1gbit --model mha --tokens 77 "
        f"--output {folder}/calibrated-mha-2.yaml --one-rank {folder}/calibrated-mha-2-alone.yaml"
    ]
    assert validate_cluster.main([str(path), "--calibrated", str(folder), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("calibrated-mha") == 2


def test_the_section_has_a_summary_and_every_setting(folder, tmp_path, capsys):
    path = tmp_path / "cluster-x.json"
    path.write_text(json.dumps(measured(folder, 1.0)))
    arguments = [str(path), "--calibrated", str(folder), "--dry-run"]
    assert validate_cluster.main(arguments) == 0
    text = capsys.readouterr().out
    assert "| TTFT | gqa, 2 | 2 | 0.0% |" in text and "| TBT | gqa, 2 | 2 | 0.0% |" in text
    assert "| all |" not in text, "there is one model"
    assert "1.00 to 1.00 in prefill steps, 1.00 to 1.00 in decode steps." in text
    assert text.count("| gqa, 2, 1201 |") == 3 and text.count("calibrates") == 2
    assert (
        validate_cluster.main([str(path), "--calibrated", str(tmp_path / "no"), "--dry-run"]) == 2
    )
    assert "calibrated-gqa-2-alone.yaml" in capsys.readouterr().err


def test_the_stored_section_is_current():
    if not validate_cluster.OUTPUT.is_file():
        pytest.skip("nothing stored yet")
    found = json.loads(validate_cluster.OUTPUT.read_text())
    text = validate_cluster.EVALUATION.read_text()
    assert validate_cluster.written(text, found) == text, "run: benchmarks/validate_cluster.py"
