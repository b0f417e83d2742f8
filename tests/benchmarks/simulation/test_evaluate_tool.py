"""benchmarks/evaluate.py: choice of stored comparisons to run again, arguments and results."""

from __future__ import annotations

import json
from functools import partial

import pytest

from benchmarks import evaluate
from benchmarks.evaluate import Stored
from benchmarks.simulation.comparisons import WANTED
from sps2_mega.cli import simulate
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.line_up import candidates


def items(*seconds, folder=None):
    return [
        Stored(path=(folder or evaluate.ROOT) / f"simulated-{n}.json", arguments={}, wall_s=s)
        for n, s in zip("abcdef", seconds, strict=False)
    ]


def chosen(known, *arguments):
    found = evaluate.selected(known, evaluate._parser().parse_args(arguments))
    return "".join(item.name for item in found)


def test_what_fits_into_the_minutes_runs():
    known = items(10, 50, 100, 200)
    assert chosen(known, "--minutes", "2", "--jobs", "1") == "ab"
    assert chosen(known, "--minutes", "8", "--jobs", "1") == "abcd"
    assert chosen(known, "--minutes", "2", "--jobs", "9") == "ab", "a long one would end late"
    assert chosen(known, "--full", "--minutes", "2") == "abcd"
    assert chosen(known, "--only", "d", "--minutes", "2") == "d"


def test_what_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no comparison x; there are a, b"):
        chosen(items(1, 2), "--only", "x")
    with pytest.raises(ConfigError, match="must be positive"):
        chosen(items(1, 2), "--jobs", "0")


def test_a_stored_comparison_runs_again_with_its_own_arguments(tmp_path):
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:17:{i:02},{n},{1 + i}" for i, n in enumerate([63, 1, 2000])]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(rows))
    output = tmp_path / "simulated-x.json"
    made = ["--trace", str(trace), "--gpus", "2", "--tune-on", "1", "--systems", "sarathi", "sps2"]
    assert simulate.main([*made, "--quiet", "--no-pictures", "--output", str(output)]) == 0
    before = json.loads(output.read_text())
    evaluate.again(Stored(path=output, arguments=before["arguments"], wall_s=1.0))
    after = json.loads(output.read_text())
    assert [o["system"]["name"] for o in after["outcomes"]] == ["sarathi", "sps2", "sps2-yield"]
    for old, new in zip(before["outcomes"], after["outcomes"], strict=False):
        assert new["figures"] == old["figures"]
    assert after["wall_s"] >= 0 and not list(tmp_path.glob("*.part"))
    assert after["arguments"] == before["arguments"] | {
        "systems": ["sarathi", "sps2", "sps2-yield"]
    }


def test_what_is_wanted_and_not_stored_can_be_run(monkeypatch):
    monkeypatch.setattr(evaluate.results, "paths", list)
    known = evaluate.stored()
    assert [item.name for item in known] == list(WANTED)
    for item in known:
        setting = simulate.setting_of(evaluate.arguments_of(item))
        assert len(setting.arrivals) == item.arguments["requests"]
        # Every system makes sense there but one engine over all GPUs where a node has them all.
        assert all(candidates(family, setting.place) for family in setting.families)
    assert not any(map(chosen, [known])), "a few minutes are not enough"


def test_every_stored_comparison_can_be_listed(capsys):
    assert evaluate.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert "llama-3-8b-h100-long" in text and text.count("\n") == len(evaluate.stored())


def test_a_full_run_that_was_interrupted_goes_on(tmp_path, monkeypatch, capsys):
    known = items(10, 50, folder=tmp_path)
    documents = []
    monkeypatch.setattr(evaluate, "UNFINISHED", tmp_path / "out" / "unfinished.json")
    monkeypatch.setattr(evaluate, "stored", lambda: known)
    monkeypatch.setattr(evaluate, "_documents", lambda: documents.append(1))
    started = []

    def completed(tasks, args):
        for name in list(tasks)[:3]:
            started.append(name)
            yield name
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_completed", completed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(["--full"])
    assert len(started) == len(set(started)) == 6 and started[:2] == ["b", "a"]
    assert json.loads(evaluate.UNFINISHED.read_text()) == started and not documents
    monkeypatch.setattr(evaluate, "_completed", lambda tasks, args: iter(tasks))
    assert evaluate.main(["--full"]) == 0
    assert "16 comparisons" in capsys.readouterr().out
    assert documents == [1] and not evaluate.UNFINISHED.exists()
    assert evaluate.main(["--full", "--only", "a"]) == 0
    assert "1 comparisons" in capsys.readouterr().out


def test_what_fails_ends_the_run_and_is_told():
    args = evaluate._parser().parse_args(["--quiet", "--jobs", "1"])
    fine = partial(print, end="")
    done = evaluate._completed({"fine": fine, "wrong": partial(int, "x"), "late": fine}, args)
    assert next(done) == "fine"
    with pytest.raises(ValueError, match="invalid literal"):
        next(done)
