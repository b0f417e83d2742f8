"""`sps2 plan`: the best layout for a trace and limits, and what it cannot plan."""

from __future__ import annotations

import pytest

from sps2_mega.cli import plan
from sps2_mega.simulator.comparison import best_settings


@pytest.fixture
def trace(tmp_path):
    rows = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    rows += [f"{i / 4},x,{n},{1 + i},0,x" for i, n in enumerate([63, 1, 30_000, 1000])]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(rows))
    return str(path)


def test_the_best_and_the_next_three_are_shown(trace, capsys):
    arguments = ["--model", "llama-3-8b", "--gpu", "h100", "--trace", trace, "--quiet"]
    assert plan.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| 1 |", "| 2 |", "| 3 |", "| 4 |"))]
    assert len(rows) == 4 and len(set(rows)) == 4


def test_plans_are_ordered_by_goodput_and_then_by_response(trace):
    args = plan.parser().parse_args(
        ["--model", "llama-3-8b", "--gpu", "h100", "--trace", trace, "--quiet", "--exact"]
    )
    found = plan.plans(args)
    assert found == best_settings.in_order(found) and len(found) > 10
    refused, goodput = (found[0].figures[key] for key in ("refused", "goodput"))
    near = [f for f in found if f.figures["goodput"] > 0.996 * goodput]
    assert all(refused <= entry.figures["refused"] for entry in found)
    responses = [entry.figures["response_s"]["mean"] for entry in near]
    assert responses == sorted(responses)
    assert all(entry.system.csa.exact for entry in found)
    assert {"sarathi", "sps2", "sps2-yield", "sps2-split"} == {entry.system.name for entry in found}
    assert {entry.system.num_gpus for entry in found} == {8}


def test_a_model_that_does_not_fit_is_refused(trace, capsys):
    arguments = ["--model", "llama-3-8b", "--gpu", "h9", "--trace", trace, "--quiet"]
    assert plan.main(arguments) == 2
    assert "h9" in capsys.readouterr().err
