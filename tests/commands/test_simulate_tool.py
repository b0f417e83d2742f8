"""`sps2 simulate`: table, JSON, ratios, refusals."""

from __future__ import annotations

import json

import pytest

from sps2_mega.cli import simulate
from sps2_mega.simulator.comparison.report import CLAIMS, gains
from sps2_mega.simulator.comparison.runs import run


@pytest.fixture
def trace(tmp_path):
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [
        f"2023-11-16 18:17:{i:02}.5,{n},{1 + i % 7}" for i, n in enumerate([63, 1, 20_000] * 6)
    ]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(rows))
    return str(path)


def call(*arguments):
    return simulate.main(["--quiet", "--tune-on", "2", *arguments])


def test_a_comparison_is_written_and_printed(trace, tmp_path, capsys):
    output = tmp_path / "out" / "run.json"
    code = call(
        "--trace", trace, "--gpus", "8", "--rates", "1", "50", "--systems", "sarathi", "sps2",
        "sps2-split", "--ablations", "--output", str(output), "--no-pictures",
    )  # fmt: skip
    assert code == 0
    text = capsys.readouterr().out
    assert "| 50 | sps2-split no-pipeline |" in text and "TTFT (paper 7.5x)" in text
    outcomes = json.loads(output.read_text())["outcomes"]
    assert len(outcomes) == 2 * (3 + 4)
    assert all(o["figures"]["requests"] == 18 for o in outcomes)
    assert {o["system"]["tp"] * o["system"]["sp"] for o in outcomes} <= {1, 2, 4, 6, 8}


def test_the_picture_is_drawn_beside_the_numbers(trace, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "run.json"
    code = call(
        "--trace", trace, "--gpus", "8", "--systems", "sarathi", "sps2", "--output", str(output)
    )
    assert code == 0
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_gains_compare_with_the_baseline_of_the_same_rate(trace):
    args = simulate.parser().parse_args(
        ["--trace", trace, "--gpus", "8", "--tune-on", "2", "--systems", "sarathi", "sps2"]
    )
    outcomes = run(simulate.setting_of(args), quiet=True)
    found = gains(outcomes, 1.0, "sps2")
    base, ours = (outcome.figures["ttft_s"]["mean"] for outcome in outcomes)
    assert found["TTFT"] == pytest.approx(base / ours)
    assert set(found) == {claim.name for claim in CLAIMS}
    assert gains(outcomes, 1.0, "sps2-csa")["TTFT"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-9"], "llama-9"),
        (["--hardware", "abacus"], "abacus"),
        (["--trace", "nonesuch"], "nonesuch"),
        (["--rates", "0"], "must be positive"),
        (["--model", "llama-3.1-70b", "--gpus", "1"], "need more than 1 GPUs"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_one_line(arguments, message, capsys):
    assert call("--requests", "2", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_windowed_model_is_simulated_with_full_attention_and_a_note(trace, capsys):
    assert call("--model", "mistral-7b", "--trace", trace, "--gpus", "2", "--systems", "sps2") == 0
    assert "full attention" in capsys.readouterr().err
