"""The soak itself: its mix, a right server that passes, and every kind of wrong one found."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import random
from collections.abc import Iterator

import pytest
import tokenizer_samples as samples
from fake_engine import FakeEngine
from fake_server import MODEL, FakeServer, serving

from benchmarks.soaking.answers import answers_of, requests
from benchmarks.soaking.cases import Answer, Case, CaseMix
from benchmarks.soaking.client import SoakResult, soak
from benchmarks.soaking.state import MemoryCurve, metrics, state_faults
from sps2_mega.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(samples.save(samples.byte_level(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def server(tokenizer: Tokenizer) -> Iterator[FakeServer]:
    engine = FakeEngine(tokenizer, max_model_len=4000, step_s=0.002)
    with serving(engine, max_samples=64) as running:
        yield running


def answer(tokenizer: Tokenizer, prompt: str, max_tokens: int) -> Answer:
    """Answer of the engine without a model, which repeats the last token."""
    return Answer(
        fields={"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True},
        prompt_ids=tokenizer.encode(prompt),
        text=prompt[-1] * max_tokens,
        num_tokens=max_tokens,
    )


def mix(tokenizer: Tokenizer, seed: int = 0) -> CaseMix:
    answers = [answer(tokenizer, f"{i}{c}", n) for i, c in enumerate("abcz") for n in (1, 5, 16)]
    return CaseMix(answers=answers, model=MODEL, max_model_len=4000, source=random.Random(seed))


def soaked(server: FakeServer, cases: list[Case]) -> SoakResult:
    return asyncio.run(soak(server.url, cases, at_once=8, timeout_s=20))


def test_a_fifth_leaves_a_tenth_is_invalid_and_all_shapes_come(tokenizer) -> None:
    cases = mix(tokenizer).draw(400)
    assert collections.Counter(case.ending for case in cases) == {
        "left": 80,
        "refused": 40,
        "whole": 280,
    }
    shapes = {case.shape for case in cases if case.ending == "whole"}
    assert shapes == {"text", "ids", "several", "samples", "stop", "echo", "logprobs"}
    assert {case.stream for case in cases if case.ending == "whole"} == {True, False}
    assert cases == mix(tokenizer).draw(400)
    assert cases != mix(tokenizer, seed=1).draw(400)


def test_a_right_server_has_no_faults_and_nothing_left(server, tokenizer) -> None:
    server.engine.stats = _without_usage(server.engine)
    result = soaked(server, mix(tokenizer).draw(100))
    assert result.faults == []
    assert (result.done, result.endings["left"], result.endings["refused"]) == (100, 20, 10)
    assert result.tokens > 300
    assert list(state_faults(server.url)) == []
    aborted = metrics(server.url, ("request_aborted_total",))["request_aborted_total"]
    assert 0 < aborted <= 20, "some were answered before they left"


def test_a_wrong_answer_is_a_fault_in_every_shape(server, tokenizer) -> None:
    def wrong(case: Case) -> Case:
        if case.ending == "refused":
            return dataclasses.replace(case, status=418)
        return dataclasses.replace(case, texts=tuple(f"?{text}" for text in case.texts))

    cases = [case for case in mix(tokenizer).draw(100) if case.ending != "left"]
    result = soaked(server, [wrong(case) for case in cases])
    assert {fault.partition(":")[0] for fault in result.faults} >= {
        f"{case.ending}, {case.shape}" for case in cases
    }


def test_lost_and_doubled_tokens_are_faults(server, tokenizer) -> None:
    cases = [case for case in mix(tokenizer).draw(60) if case.num_tokens]
    more = [dataclasses.replace(case, num_tokens=case.num_tokens + 1) for case in cases]
    assert len(soaked(server, more).faults) == len(cases)


def test_a_left_stream_must_have_begun_right(server, tokenizer) -> None:
    left = [case for case in mix(tokenizer).draw(100) if case.ending == "left" and case.stream]
    read = [case for case in left if case.leave_after >= 1]
    wrong = [dataclasses.replace(case, texts=("?",)) for case in read]
    assert len(soaked(server, wrong).faults) == len(read) > 3


def test_a_server_that_is_gone_is_a_fault_for_every_request(tokenizer) -> None:
    cases = [case for case in mix(tokenizer).draw(20) if case.ending == "whole"]
    result = asyncio.run(soak("http://127.0.0.1:1", cases, at_once=3))
    assert len(result.faults) == result.done == len(cases)


def test_what_is_still_in_use_is_told(server, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.soaking.state._SETTLE_S", 0.2)
    with server.client().completions.create(
        model=MODEL, prompt="x", max_tokens=3900, stream=True
    ) as stream:
        next(iter(stream))
        faults = "\n".join(state_faults(server.url))
    assert "num_requests_running is 1.0 at the end and not 0" in faults
    assert "kv_cache_usage_perc is 0.5 at the end" in faults
    assert "open_requests" in faults


def test_memory_must_be_flat_in_the_second_half_only() -> None:
    settled, grown = MemoryCurve(), MemoryCurve()
    for done in range(101):
        settled.add(done, 500 + 10 * min(done, 40))
        grown.add(done, 500 + 10 * done)
    assert list(settled.faults(100)) == []
    [fault] = grown.faults(100)
    assert "resident memory went from -20.0 to +20.0 %" in fault
    assert MemoryCurve().spread(10) == (0.0, 0.0)
    assert len(settled.outline()) <= 21


def test_requests_have_mixed_lengths_and_their_answers_are_found_again(tmp_path) -> None:
    lines = requests(9, 700)
    lengths = [len(line["prompt"]) for line in lines]
    assert min(lengths) == 1 and max(lengths) == 700
    assert {line.get("seed") is None for line in lines} == {True, False}
    assert len({line["id"] for line in lines}) == len(lines)
    told = tmp_path / "told.jsonl"
    records = [{"id": line["id"], "text": "t", "token_ids": [1, 2]} for line in reversed(lines)]
    told.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = answers_of(lines, told)
    assert [one.fields["prompt"] for one in found] == [line["prompt"] for line in lines]
    assert found[0].num_tokens == 2
    told.write_text("")
    with pytest.raises(RuntimeError, match="no answer to 0-1"):
        answers_of(lines, told)


def _without_usage(engine: FakeEngine):
    """Engine statistics with a used cache only while there is work.

    The engine without a model always reports that half of its cache is used.
    """
    told = engine.stats
    return lambda: dataclasses.replace(told(), kv_usage=0.5 if engine.has_work() else 0.0)
