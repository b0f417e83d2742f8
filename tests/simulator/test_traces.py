"""Trace files: every published format, the bundled traces, drawn and synthetic arrivals."""

from __future__ import annotations

import gzip
import json
import statistics

import pytest

from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.poisson import poisson
from sps2_mega.simulator.trace_files import BUNDLED, read_trace


def lines(path, *rows):
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("name", "count", "longest"),
    [
        ("mooncake", 12_031, 126_195),
        ("mooncake-synthetic", 3_993, 191_378),
        ("azure-code", 8_819, 7_437),
        ("azure-conversation", 19_366, 14_050),
    ],
)
def test_bundled_traces_are_whole(name, count, longest):
    arrivals = read_trace(name)
    assert len(arrivals) == count
    assert max(a.prompt_len for a in arrivals) == longest
    times = [a.time_s for a in arrivals]
    assert times[0] == 0.0 and times == sorted(times)


def test_a_coarse_clock_is_spread_evenly(tmp_path):
    row = '{{"timestamp": {}, "input_length": 5, "output_length": 1, "hash_ids": [7]}}'
    path = lines(tmp_path / "m.jsonl", *(row.format(t) for t in (1000, 1000, 1000, 2500, 9000)))
    arrivals = read_trace(path)
    assert [a.time_s for a in arrivals] == pytest.approx([0.0, 0.5, 1.0, 1.5, 8.0])
    assert arrivals[0].hash_ids == (0,) and arrivals[0].hash_block == 512


def test_mooncake_prompts_share_what_the_trace_says():
    first, second = read_trace("mooncake", limit=2)
    assert first.prompt_len == 6758 and len(first.hash_ids) == 14
    ours, theirs = first.token_ids(0), second.token_ids(1)
    assert len(ours) == 6758 and ours[:512] == theirs[:512] and ours[512] != theirs[512]


def test_bailian_counts_seconds_and_blocks_of_16(tmp_path):
    rows = [
        {
            "chat_id": i,
            "parent_chat_id": -1,
            "timestamp": 61.5 + i,
            "input_length": 33,
            "output_length": 4,
            "type": "text",
            "turn": 1,
            "hash_ids": [10**18, i, i + 1],
        }
        for i in range(2)
    ]
    path = tmp_path / "q.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    first, second = read_trace(str(path))
    assert (first.time_s, second.time_s, first.hash_block) == (0.0, 1.0, 16)
    assert first.hash_ids[0] == second.hash_ids[0] < 10 and len(first.token_ids(0)) == 33


def test_azure_times_with_seven_digits_zones_and_no_fraction(tmp_path):
    path = lines(
        tmp_path / "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:04+00:00,1,1",
        "2023-11-16 18:17:05.5+00:00,63,8",
        "2023-11-16 18:17:06,0,8",
    )
    arrivals = read_trace(path)
    assert [a.prompt_len for a in arrivals] == [4808, 1, 63], "a row without tokens is left out"
    assert [a.time_s for a in arrivals] == pytest.approx([0.0, 0.02004, 1.52004], abs=1e-5)


@pytest.mark.parametrize("session", ["", "Session ID,Elapsed time,"])
def test_burstgpt_with_and_without_sessions(tmp_path, session):
    extra = "s,1.0," if session else ""
    path = lines(
        tmp_path / "b.csv",
        f"Timestamp,{session}Model,Request tokens,Response tokens,Total tokens,Log Type",
        f"5,{extra}ChatGPT,472,18,490,Conversation log",
        f"45.5,{extra}GPT-4,30,0,30,API log",
        f"65,{extra}GPT-4,30,1,31,API log",
    )
    assert [(a.time_s, a.prompt_len, a.output_len) for a in read_trace(path)] == [
        (0.0, 472, 18),
        (60.0, 30, 1),
    ]


def test_servegen_draws_the_rate_and_the_lengths_of_the_client():
    arrivals = read_trace("servegen", seed=1)
    assert arrivals == read_trace("servegen", seed=1) != read_trace("servegen", seed=2)
    assert 12_000 < len(arrivals) < 26_000, "about 18,571 a day"
    assert statistics.mean(a.prompt_len for a in arrivals) == pytest.approx(16_734, rel=0.1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"timestamp": 0, "input_length": 5}', "line 1.*output_length"),
        ("x.jsonl", '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
         "1 names of 512 tokens for 513"),
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1", "line 2"),
        ("x.csv", "a,b,c\n1,2,3", "not a trace of Mooncake"),
        ("x-trace.csv", "0,1,1,Gamma,1,1", "x-dataset.json beside it"),
        ("x.csv", "", "empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(str(path))


def test_an_unknown_trace_is_refused_with_the_names_that_there_are():
    with pytest.raises(ConfigError, match="mooncake-synthetic"):
        read_trace("nonesuch")
    assert "mooncake" in BUNDLED


def test_poisson_arrivals_have_the_rate_and_the_lengths():
    arrivals = poisson([(63, 1), (1000, 7)], rate=4.0, count=2000, seed=3)
    assert arrivals[-1].time_s == pytest.approx(500, rel=0.1)
    assert {(a.prompt_len, a.output_len) for a in arrivals} == {(63, 1), (1000, 7)}
    assert arrivals == poisson([(63, 1), (1000, 7)], rate=4.0, count=2000, seed=3)
    with pytest.raises(ConfigError, match="rate > 0"):
        poisson([(1, 1)], rate=0.0, count=1, seed=0)


def test_an_arrival_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="at least one token"):
        Arrival(time_s=0.0, prompt_len=0, output_len=1)
