"""The planner against all settings there are, and the grid of those."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import plan_sweep
from benchmarks.simulation.combinations import COMBINATIONS, Combination
from sps2_mega.simulator.comparison.neighbours import everything, neighbours
from sps2_mega.simulator.hardware import load_hardware
from sps2_mega.simulator.line_up import Place, candidates
from tests.simulator.small_model import MODEL

PLACE = Place(model=MODEL, hardware=load_hardware("h100"), gpus=16)


@pytest.mark.parametrize("family", ["sarathi", "sps2", "sps2-csa", "sps2-yield", "sps2-split"])
def test_neighbours_fit_and_differ_in_few_knobs(family):
    for system in candidates(family, PLACE):
        for other in neighbours(system, PLACE):
            assert other.num_gpus <= 16 and other != system and other.name == system.name
            before, after = dataclasses.asdict(system), dataclasses.asdict(other)
            changed = {key for key in before if before[key] != after[key]}
            # Another number of engines changes their SP too, and CSA has a degree per SP level.
            allowed = {"replicas", "sp", "csa"}, {"decode_replicas", "sp", "csa"}
            assert len(changed) == 1 or any(changed <= knobs for knobs in allowed) or (
                changed == {"decode_tp", "decode_replicas"}
            )  # fmt: skip
            if not other.csa.exact:
                levels = other.csa.level_degrees
                assert len(levels) == 1 + len(
                    PLACE.hardware.sp_machine(other.tp, other.sp).sp_levels
                )


def test_everything_has_each_setting_once():
    start = [*candidates("sarathi", PLACE), *candidates("sps2-split", PLACE)]
    found = everything(start, PLACE)
    assert len(found) > 1.5 * len(start)
    assert all(found.count(system) == 1 for system in found)
    assert {s.chunk_tokens for s in found if s.policy == "sarathi"} >= {256, 1024, 4096}


def test_twenty_combinations_are_all_different_and_some_are_built():
    assert len({each.name for each in COMBINATIONS}) == 20
    for each in (COMBINATIONS[5], COMBINATIONS[13]):
        place, seen, coming, _ = plan_sweep._problem(each)
        assert len(seen) == len(coming) == each.requests and coming[0].time_s == 0.0
        assert place.gpus == 8 * each.nodes


def test_a_row_compares_the_choice_with_the_best(tmp_path):
    rows = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    rows += [f"{i / 4},x,{n},{1 + i},0,x" for i, n in enumerate([63, 1, 3000, 100] * 2)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(rows))
    small = Combination(
        model="llama-3-8b", hardware="h100", nodes=1, trace=str(trace), rate=1.0, requests=4
    )
    row = plan_sweep.swept(small)
    assert 0.0 <= row["regret"] <= 1.0 and 1 <= row["place"] <= row["settings"]
    assert row["best_goodput"] >= row["goodput"] > 0
    text = plan_sweep.section([row])
    assert small.name in text and text.endswith("of 1.")


def row_of(combination, **figures):
    goodput = dict(goodput=1.0, best_goodput=1.0, regret=0.0, response_s=1.0, best_response_s=1.0)
    return dict(
        name=combination.name,
        combination=dataclasses.asdict(combination),
        settings=1,
        chosen="x",
        best="x",
        place=1,
        **goodput | figures,
    )


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "sweep.json"
    assert plan_sweep.stored(path) == []
    for each in reversed(COMBINATIONS):
        plan_sweep.keep(row_of(each), path, "--only 1")
    plan_sweep.keep(row_of(COMBINATIONS[3], regret=0.5), path, "--only 4 --again")
    rows = plan_sweep.stored(path)
    assert [row["name"] for row in rows] == [each.name for each in COMBINATIONS]
    assert [row["regret"] for row in rows] == [0.0] * 3 + [0.5] + [0.0] * 16
    assert json.loads(path.read_text())["command"].endswith("plan_sweep.py --only 4 --again")
    # Nothing is left to do.
    monkeypatch.setattr(plan_sweep, "swept", None)
    assert plan_sweep.main(["--output", str(path), "--quiet"]) == 0
    assert "19 of 20" in capsys.readouterr().out
    # A combination that is no longer asked for like that counts as missing.
    changed = json.loads(path.read_text())
    changed["rows"][0]["combination"]["requests"] = 7
    path.write_text(json.dumps(changed))
    assert len(plan_sweep.stored(path)) == 19


def test_numbers_that_are_not_there_are_refused(tmp_path, capsys):
    for wrong in (["--only", "0"], ["--only", "21"], ["--jobs", "0"]):
        assert plan_sweep.main([*wrong, "--output", str(tmp_path / "x.json")]) == 2
    assert "takes 1 to 20" in capsys.readouterr().err


def test_the_table_in_the_document_is_current():
    text = plan_sweep.EVALUATION.read_text()
    assert plan_sweep.written(text) == text, "run: python benchmarks/plan_sweep.py"
