"""Paired replays: slices of a trace, ratios by slice, table and picture, refusals."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks import replay
from benchmarks.trace_replay.figures import ratios, table
from benchmarks.trace_replay.plot import plot
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.trace_files import read_trace


def run(system, number, ttft, *, rate="1gbit", tbt=0.05):
    def spread(value):
        return None if value is None else {"mean": value, "p50": value / 2, "p99": value * 3}

    figures = {
        "ttft_s": spread(ttft),
        "tbt_s": spread(tbt),
        "response_s": spread(ttft + 1.0),
        "answered": 5,
        "requests": 6,
        "errors": {},
    }
    return {"rate": rate, "slice": number, "system": system, "figures": figures}


RUNS = [
    run("sarathi", 1, 4.0), run("sarathi", 2, 9.0), run("sarathi", 3, 6.0),
    run("sps2", 1, 2.0), run("sps2", 2, 3.0, tbt=None), run("sps2", 3, 6.0),
    run("sarathi", 1, 1.0, rate="2mbit"),
]  # fmt: skip


def test_ratios_are_of_the_same_slice():
    found = ratios(RUNS, "sarathi")
    assert found.keys() == {"1gbit"}, "at the other rate there is nothing to compare with"
    gains = found["1gbit"]["sps2"]
    assert gains["TTFT mean"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert gains["TBT p99"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert "sarathi" not in found["1gbit"]


def test_the_table_has_every_system_and_says_what_failed():
    lines = table(RUNS, "sarathi").splitlines()
    assert len(lines) == 2 + 3
    assert lines[2].startswith("| 1gbit | sarathi | 6.33 s | 50 ms |")
    assert "| 15 of 18 | 2.00x (1.00-3.00) |" in lines[3]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot(RUNS, "sarathi", tmp_path / "x.png", title="x")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_slices_follow_one_another_and_can_be_read_back(tmp_path):
    first, second = (replay.slice_of("mooncake", number, 7) for number in (0, 1))
    assert [*first, *second] == read_trace("mooncake", limit=14)
    replay.write_slice(second, tmp_path / "slice.jsonl")
    back = read_trace(str(tmp_path / "slice.jsonl"))
    assert [(a.prompt_len, a.output_len) for a in back] == [
        (a.prompt_len, a.output_len) for a in second
    ]
    for before, after in zip(second, back, strict=True):
        assert after.time_s == pytest.approx(before.time_s - second[0].time_s, abs=0.01)
    with pytest.raises(ConfigError, match="no slice 9"):
        replay.slice_of(str(tmp_path / "slice.jsonl"), 9, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "1"], "at least 2 nodes"),
        (["--slices", "0"], "1 slice"),
        (["--systems", "sps2,pigeon"], "unknown system pigeon; known are sps2, sps2-csa"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, message):
    with pytest.raises(ConfigError, match=message):
        replay.check(replay.parser().parse_args(arguments))


def test_an_interrupted_replay_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(replay.machine, "ROOT", tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    made = ["--save", "--rates", "1gbit,2mbit", "--slices", "2", "--systems", "sps2"]
    args = replay.parser().parse_args(made)
    assert replay.saved(args) == ([], {})
    before = [run("sarathi", 1, 4.0), run("sarathi", 2, 9.0), run("sps2", 1, 2.0)]
    tuning = {"1gbit": {"256": 2.0, "512": 1.0, "1024": 3.0}}
    path = tmp_path / "docs" / "results" / "replay.json"
    content = {
        "settings": replay._settings(args),
        "chunk_sizes_response_s": tuning,
        "runs": before,
    }
    path.write_text(json.dumps(content))
    assert replay.saved(args) == (before, tuning)
    for other in (["--requests", "7"], ["--again"]):
        assert replay.saved(replay.parser().parse_args([*made, *other])) == ([], {})

    class Cluster:
        def set_link(self, link):
            links.append(link.bits_per_s)

    def replayed(self, flags, slices):
        for number in slices:
            served.append((flags[0].strip("-"), flags[-1].rpartition("=")[2], number))
            yield number, run("x", number, 1.0)["figures"]

    links, served = [], []
    monkeypatch.setattr(replay, "stretched", lambda *_: "model")
    monkeypatch.setattr(replay.Replays, "_replayed", replayed)
    runs, tuning = replay.saved(args)
    replays = replay.Replays(args, Cluster(), tmp_path, tuning)
    new = list(replays.all_runs({replay._which(each) for each in runs}))
    found = [(each["rate"], each["system"], each["slice"]) for each in new]
    slow = [("2mbit", name, number) for name in ("sarathi", "sps2") for number in (1, 2)]
    assert found == [("1gbit", "sps2", 2), *slow]
    assert links == [1e9, 2e6]
    # The first rate's chunk size is known and not needed; the second's is searched on slice 0.
    tuned = [("tp", size, 0) for size in ("256", "512", "1024")]
    replayed = [("tp", "256", 1), ("tp", "256", 2), ("sp", "2", 1), ("sp", "2", 2)]
    assert served == [("sp", "2", 2), *tuned, *replayed]
    assert replays.tuning["2mbit"] == dict.fromkeys(("256", "512", "1024"), 2.0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may")
def test_without_root_it_says_so(capsys):
    assert replay.main([]) == 2
    said = capsys.readouterr().err
    assert "root" in said or "iproute2" in said
