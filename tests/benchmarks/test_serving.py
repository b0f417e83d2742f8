"""Load client: workloads with the trace's sharing, exact times, counted tokens, named failures."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator

import pytest
import tokenizer_samples as samples
from fake_engine import FakeEngine
from fake_server import MODEL, FakeServer, serving

from benchmarks import serving as bench
from benchmarks.load.client import Record, Target, ask, open_client
from benchmarks.load.figures import figures, spread, timings_of_record
from benchmarks.load.replay import Replay, replay
from benchmarks.load.requests import TimedRequest, fitting, id_range, scaled, with_prompts
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.figures import Limits
from sps2_mega.text.tokenizer import Tokenizer

IDS = range(32, 127)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(samples.save(samples.byte_level(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[FakeServer]:
    with serving(FakeEngine(tokenizer, max_model_len=200), api_key="secret") as running:
        yield running


def arrival(prompt_len: int, *names: int, time_s: float = 0.0, block: int = 4) -> Arrival:
    return Arrival(
        time_s=time_s, prompt_len=prompt_len, output_len=3, hash_ids=names, hash_block=block
    )


def prompts(arrivals: list[Arrival], kind: str = "ids", salt: str = "s") -> list:
    made = with_prompts(arrivals, kind=kind, ids=IDS, salt=salt)  # type: ignore[arg-type]
    return [request.prompt for request in made]


def shared(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def test_equal_names_are_equal_tokens_and_nothing_else_is() -> None:
    first, second, third = prompts([arrival(11, 7, 8, 9), arrival(10, 7, 8, 3), arrival(9)])
    assert [len(p) for p in (first, second, third)] == [11, 10, 9]
    assert first[:8] == second[:8]
    assert first[8:10] != second[8:10]
    assert set(first + third) <= set(IDS)
    assert first[:9] != third


@pytest.mark.parametrize(("length", "both"), [(1.0, 32), (0.3, 10), (2.5, 80), (0.01, 1)])
def test_scaled_prompts_share_as_much_of_themselves(length, both) -> None:
    plain = [arrival(40, 7, 8, 9, block=16), arrival(41, 7, 8, 5, block=16)]
    first, second = prompts(scaled(plain, length=length))
    assert len(first) == max(1, round(40 * length))
    # Blocks are whole tokens, so scaling rounds shared lengths up.
    assert min(len(first), both) <= shared(first, second) <= both + 2


def test_another_salt_gives_other_prompts_and_the_same_salt_the_same() -> None:
    asked = [arrival(30, 1, 2, 3, 4, 5, 6, 7, 8), arrival(30)]
    assert prompts(asked) == prompts(asked)
    for mine, other in zip(prompts(asked), prompts(asked, salt="t"), strict=True):
        assert mine != other


def test_texts_have_the_asked_length() -> None:
    [characters] = prompts([arrival(13)], kind="characters")
    [words] = prompts([arrival(13)], kind="words")
    assert len(characters) == 13
    assert len(words.split()) == 13


def test_times_and_lengths_are_scaled_and_long_requests_left_out() -> None:
    [one] = scaled([arrival(10, time_s=4.0)], time=0.25, length=0.01, output=3.0)
    assert (one.time_s, one.prompt_len, one.output_len) == (1.0, 1, 9)
    assert fitting([arrival(7), arrival(8)], 10) == [arrival(7)]
    with pytest.raises(ConfigError, match="scales must be > 0"):
        scaled([arrival(1)], time=0.0)


@pytest.mark.parametrize("text", ["32", "9-3", "a-b", "-5", "4-4"])
def test_a_range_of_ids_must_be_one(text) -> None:
    with pytest.raises(ConfigError, match="LOW-HIGH"):
        id_range(text)
    assert id_range("32-126") == IDS


def timed(due_s: float, *, prompt: str = "ab", output_len: int = 3) -> TimedRequest:
    return TimedRequest(due_s=due_s, prompt=prompt, prompt_len=len(prompt), output_len=output_len)


def test_requests_go_out_in_time_whatever_earlier_ones_do() -> None:
    async def run_all() -> Replay:
        all_sent = asyncio.Barrier(3)

        async def together(request: TimedRequest, due: float) -> Record:
            sent = time.monotonic()
            await all_sent.wait()  # no answers before the last request is sent
            return Record(request=request, due=due, sent=sent, end=time.monotonic())

        wanted = [timed(0.1), timed(0.0), timed(0.1)]  # in any order
        return await replay(wanted, together, max_in_flight=None, timeout_s=20)

    run = asyncio.run(run_all())
    assert run.most_in_flight == 3
    assert [record.request.due_s for record in run.records] == [0.0, 0.1, 0.1]
    assert all(record.error is None and record.sent >= record.due for record in run.records)


def test_what_waits_for_a_place_is_late_and_that_counts() -> None:
    async def slow(request: TimedRequest, due: float) -> Record:
        began = time.monotonic()
        await asyncio.sleep(0.1)
        return Record(
            request=request, due=due, sent=began, end=began + 0.1, token_times=[began + 0.1]
        )

    run = asyncio.run(
        replay([timed(0.0)] * 3, slow, max_in_flight=1, timeout_s=5),
    )
    assert run.most_in_flight == 1
    waited = [timings_of_record(record).ttft_s for record in run.records]
    assert all(found >= least for found, least in zip(waited, [0.1, 0.2, 0.3], strict=True))


def test_a_request_that_takes_too_long_is_given_up() -> None:
    async def never(request: TimedRequest, due: float) -> Record:
        await asyncio.sleep(60)
        raise AssertionError

    run = asyncio.run(replay([timed(0.0)], never, max_in_flight=2, timeout_s=0.05))
    assert run.records[0].error == "timeout: whole request"


def asked(server: FakeServer, requests: list[TimedRequest], **target: object) -> list[Record]:
    settings = {"url": server.url, "model": MODEL, "api_key": "secret", **target}

    async def all_of_them() -> list[Record]:
        async with open_client(10) as client:
            aim = Target(**settings)  # type: ignore[arg-type]
            return [await ask(client, aim, request, time.monotonic()) for request in requests]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_every_token_is_an_event_and_the_servers_counts_are_kept(server, api) -> None:
    [record] = asked(server, [timed(0.0, output_len=9)], api=api)
    assert record.error is None
    assert len(record.token_times) == record.num_tokens == 9
    assert record.prompt_tokens >= 3
    assert len("".join(record.text)) == 9
    assert sorted(record.token_times) == record.token_times


def test_one_token_has_no_gap(server) -> None:
    [record] = asked(server, [timed(0.0, prompt="a", output_len=1)])
    timings = timings_of_record(record)
    assert (timings.per_token_s, timings.gaps_s) == (None, ())


def test_failures_are_told_apart(server, tokenizer) -> None:
    [long] = asked(server, [timed(0.0, prompt="x" * 300)])
    [unknown] = asked(server, [timed(0.0)], model="other")
    [locked] = asked(server, [timed(0.0)], api_key="wrong")
    [nobody] = asked(server, [timed(0.0)], url="http://127.0.0.1:1")
    with serving(FakeEngine(tokenizer, step_s=0.5)) as slow:
        [late] = asked(slow, [timed(0.0)], api_key="none")
        slow.http.call_soon(slow.async_engine.fail, "lost")
        [down] = asked(slow, [timed(0.0)], api_key="none")
    assert [record.error for record in (long, unknown, locked, nobody, late, down)] == [
        "http 413: context_length_exceeded",
        "http 404: model_not_found",
        "http 401: invalid_api_key",
        "connection: ConnectError",
        None,
        "http 503: failed",
    ]


def test_figures_of_known_times() -> None:
    def record(due: float, *times: float, tokens: int | None = None, error: str | None = None):
        return Record(
            request=timed(due, output_len=4),
            due=due,
            sent=due,
            end=due + 9,
            token_times=list(times),
            output_tokens=tokens,
            prompt_tokens=5,
            error=error,
        )

    run = Replay(
        records=[
            record(0.0, 1.0, 1.5, 2.5, 3.0),
            record(1.0, 1.5, 2.5, tokens=4),  # two tokens had no text of their own
            record(2.0, error="http 503: failed"),
        ],
        start=0.0,
        duration_s=4.0,
        client_cpu_s=0.4,
        most_in_flight=2,
    )
    found = figures(run, Limits(ttft_s=0.75, tbt_s=2.0))
    assert found["ttft_s"]["mean"] == pytest.approx(0.75)
    assert found["tbt_s"]["max"] == pytest.approx(1.0)
    assert found["tpot_s"]["max"] == pytest.approx(2 / 3)
    assert found["tpot_s"]["p50"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["response_s"]["max"] == pytest.approx(3.0)
    assert (found["answered"], found["output_tokens"]) == (2, 8)
    assert found["errors"] == {"http 503: failed": 1}
    assert found["goodput_per_s"] == pytest.approx(1 / 4)
    assert found["good_share"] == pytest.approx(1 / 3)
    assert found["tokens_per_event"] == pytest.approx(8 / 6)
    assert found["shorter_than_asked"] == 0
    assert found["client_cpu_share"] == pytest.approx(0.1)
    assert spread([]) is None


def test_the_command_writes_figures_and_a_picture_but_no_key(server, tmp_path, capsys) -> None:
    output = tmp_path / "run.json"
    command = ["--url", server.url, "--api-key", "secret", "--output", str(output)]
    load = ["--poisson", "100", "--lengths", "5:3,90:2,300:1", "--requests", "12"]
    load += ["--prompts", "characters"]  # some ids are half a character, which is no text by itself
    assert bench.main([*command, *load, "--seeds", "0", "1"]) == 0
    text = output.read_text()
    record = json.loads(text)
    assert "secret" not in text
    assert record["settings"]["model"] == MODEL
    for seed, run in enumerate(record["runs"]):
        assert run["seed"] == seed
        assert run["answered"] == run["requests"] == 12 - run["left_out"]
        assert run["tokens_per_event"] == 1.0
        assert run["shorter_than_asked"] == 0
    assert record["runs"][0]["left_out"] > 0, "300 tokens do not fit 200"
    assert os.path.getsize(output.with_suffix(".png")) > 10_000
    assert "left out as too long" in capsys.readouterr().out


def test_a_trace_is_replayed_and_failures_make_the_exit_code(server, capsys) -> None:
    command = ["--url", server.url, "--api-key", "secret", "--trace", "mooncake"]
    scales = ["--requests", "8", "--time-scale", "0.01", "--length-scale", "0.001"]
    assert bench.main([*command, *scales, "--output-scale", "0.01"]) == 0
    assert bench.main([*command, *scales, "--output-scale", "0.01", "--model", "no"]) == 1
    assert "http 404: model_not_found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--lengths", "1:1"], "--lengths needs --poisson"),
        (["--poisson", "1", "--lengths", "5"], "IN:OUT"),
        (["--poisson", "0"], "rate > 0"),
        (["--trace", "nothing"], "neither a file nor"),
        (["--requests", "0"], ">= 1"),
        (["--extra", "[]"], "JSON object"),
        (["--api", "chat", "--prompts", "ids"], "takes texts"),
        (["--length-scale", "9999"], "no request"),
    ],
)
def test_what_cannot_be_run_is_said(server, capsys, wrong, message) -> None:
    assert bench.main(["--url", server.url, "--api-key", "secret", *wrong]) == 2
    assert message in capsys.readouterr().err
