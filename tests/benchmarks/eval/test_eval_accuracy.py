"""The command: equal measures on one rank and on four, and its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import free_port, run_ranks

from benchmarks.eval.measure import TextScores, text_measures
from benchmarks.eval.report import markdown, merged
from benchmarks.eval.study import mean_error, share_error
from benchmarks.eval.summary import summary
from sps2_mega.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks" / "eval_accuracy.py"
SMALL = [
    *("--settings", "keys-d4", "paper-d2.4", "keys-d4-b16-stridedecode", "--lengths", "450"),
    *("--texts", "1", "--seeds", "0", "5", "--halo", "20", "--tail", "30"),
    *("--tasks", "passkey", "second_turn", "--depths", "0.1", "0.6"),
    *("--probes", "1", "--threads", "1", "--name", "small"),
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, "--output", str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "small.json").read_text()), folder


def evaluate_on_rank(rank: int, port: int, flags: list[str]) -> int:
    from benchmarks import eval_accuracy

    os.environ["MASTER_PORT"] = str(port)
    return eval_accuracy.main(flags)


def test_four_ranks_measure_what_one_rank_does(one_rank, tmp_path):
    expected, _ = one_rank
    flags = [*SMALL, "--output", str(tmp_path), "--sp", "2", "--tp", "2"]
    assert run_ranks(evaluate_on_rank, 4, free_port(), flags, timeout=200) == [0] * 4
    measured = json.loads((tmp_path / "small.json").read_text())
    assert list(measured["settings"])[2:] == ["paper-d2.4", "keys-d4-b16-stridedecode"]
    for name, by_length in expected["settings"].items():
        theirs, ours = by_length["450"], measured["settings"][name]["450"]
        for key in ("bits_per_byte", "perplexity", "kl_from_dense"):
            assert ours["text"][key] == pytest.approx(theirs["text"][key], abs=1e-4)
        assert ours["text"]["by_position"] == pytest.approx(theirs["text"]["by_position"], abs=1e-4)
        assert ours["cost"] == theirs["cost"]
        for task, found in theirs["tasks"].items():
            # Cached blocks lie on other ranks, but their number is equal.
            assert ours["tasks"][task] == found


def test_measures_are_sensible(one_rank):
    result, folder = one_rank
    dense, keys, paper, strided = (result["settings"][name]["450"] for name in result["settings"])
    assert 0.5 < dense["text"]["bits_per_byte"] < 4  # the bundled model has learned something
    assert dense["text"]["kl_from_dense"] == 0 and dense["text"]["delta_bits_per_byte"] == 0
    assert 0 < keys["text"]["kl_from_dense"] < paper["text"]["kl_from_dense"]
    assert paper["cost"]["flops"] < keys["cost"]["flops"] < 1
    assert strided["cost"]["decode_keys"] < 0.5 < keys["cost"]["decode_keys"]
    passkey = dense["tasks"]["passkey"]
    assert passkey["num_probes"] == 4 and set(passkey["seeds"]) == {"0", "5"}
    assert passkey["change"] == 0 and passkey["standard_error"] > 0
    for found in (dense, keys, paper, strided):
        # The second turn computes its question and what did not fill a block.
        assert found["tasks"]["second_turn"]["cached"] > 0.9
        assert found["tasks"]["passkey"]["cached"] == 0
    # Queries whose own cell begins at 0 see all keys; of the first eighth only the last one has
    # another cell.
    first, *others = zip(keys["text"]["by_position"], dense["text"]["by_position"], strict=True)
    assert first[0] == pytest.approx(first[1], abs=1e-3)
    assert max(abs(ours - exact) for ours, exact in others) > 2e-3
    table = (folder / "small.md").read_text()
    assert table == f"{summary(result)}\n\n{markdown(result)}\n"
    assert "| `paper-d2.4` |" in table and "2 texts, 4 probes per task" in table


def test_pictures_are_drawn(one_rank):
    pytest.importorskip("matplotlib")
    _, folder = one_rank
    for name in ("small.png", "small-frontier-450.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_what_another_setting_beats_is_not_on_the_frontier():
    pytest.importorskip("matplotlib")
    from benchmarks.eval.pictures import pareto

    points = {"a": (1.0, 0.0), "b": (0.5, 0.1), "c": (0.5, 0.2), "d": (0.2, 0.3), "e": (0.6, 0.1)}
    points["f"] = (0.1, 0.3)
    assert pareto(points, higher_is_better=False) == [(0.1, 0.3), (0.5, 0.1), (1.0, 0.0)]
    assert pareto(points, higher_is_better=True) == [(0.1, 0.3)]


def test_results_of_other_lengths_are_merged(one_rank, tmp_path):
    result, folder = one_rank
    longer = json.loads(json.dumps(result).replace('"450"', '"460"')) | {"lengths": [460]}
    (tmp_path / "longer.json").write_text(json.dumps(longer))
    merge = ["--merge", str(tmp_path / "longer.json"), str(folder / "small.json")]
    command = [sys.executable, str(SCRIPT), *merge, "--output", str(tmp_path), "--name", "all"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    both = json.loads((tmp_path / "all.json").read_text())
    assert both["lengths"] == [450, 460]
    assert both["settings"]["dense"] == result["settings"]["dense"] | longer["settings"]["dense"]
    (row,) = [line for line in summary(both).splitlines() if "`keys-d4-b16-stridedecode`" in line]
    _, _, flops, sent, reads, change, *_ = row.split("|")
    # Costs at 131072 tokens: 1/8 of the pairs, then 1/4 of the rest; the tail and the halo weigh
    # nothing.
    assert float(flops) == pytest.approx(0.35, abs=0.011)
    assert float(sent) == pytest.approx(0.25, abs=0.011)
    assert float(reads) == pytest.approx(0.25, abs=0.011)
    assert change.count("±") == 2 and change.count("/") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["twice", "450"]),
        ({"lengths": [460], "seeds": [3]}, ["other", "seeds [3]", "[0, 5]"]),
        ({"lengths": [460], "settings": {}}, ["other", "settings"]),
    ],
)
def test_results_that_differ_in_more_are_not_merged(one_rank, change, words):
    result, _ = one_rank
    with pytest.raises(ConfigError) as error:
        merged([result, result | change], ["one", "other"])
    for word in words:
        assert word in str(error.value)


def test_shares_have_errors_even_where_all_are_alike():
    assert share_error([1.0] * 8) == pytest.approx((0.9 * 0.1 / 10) ** 0.5)
    assert share_error([0.0, 1.0]) == pytest.approx((0.25 / 4) ** 0.5)
    assert mean_error([1.0]) is None
    assert mean_error([0.0, 1.0, 2.0]) == pytest.approx((1 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--settings", "keys"], ["'keys'"]),
        (["--lengths", "200000"], ["200000 tokens", "data has"]),
        (["--spans", "0"], ["span", "'0'"]),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, flags, words):
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *flags, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 2
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_measures_by_hand():
    """Two windows of 6 predicted tokens, of which the last two are the longest tail's."""
    log2 = torch.log(torch.tensor(2.0)).double()
    dense_rows = torch.log_softmax(torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]), -1)
    rows = torch.log_softmax(torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 0.0]]), -1)
    num_bytes = torch.tensor([[1.0, 1, 2, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).double()
    dense = TextScores(
        nats_WT=torch.ones(2, 6).double() * log2,
        bytes_WT=num_bytes,
        rows=[dense_rows, dense_rows],
        stride=2,
    )
    nats = torch.tensor([[2.0, 2, 2, 2, 9, 9], [3, 3, 3, 3, 9, 9]]).double() * log2
    scores = TextScores(nats_WT=nats, bytes_WT=num_bytes, rows=[rows, rows], stride=2)
    measured = text_measures(scores, dense, tail=2)
    assert measured["bits_per_byte"] == pytest.approx((8 + 12) / (5 + 4))
    deltas = [8 / 5 - 4 / 5, 12 / 4 - 4 / 4]
    assert measured["delta_bits_per_byte"] == pytest.approx(sum(deltas) / 2)
    assert measured["delta_standard_error"] == pytest.approx((deltas[1] - deltas[0]) / 2)
    assert measured["perplexity"] == pytest.approx(2 ** (20 / 8))
    p = dense_rows[0].exp()
    kl = (p * (dense_rows[0] - rows[0])).sum().item()
    assert measured["kl_from_dense"] == pytest.approx(kl / 2)  # the third row is in the tail
    assert measured["num_tokens"] == 8
