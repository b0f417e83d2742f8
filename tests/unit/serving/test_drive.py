from __future__ import annotations

import pytest
from fake_engine import FakeEngine

from sps2_mega.serving.drive import Submission, drive, failed
from sps2_mega.types import SamplingParams


def submission(name: str, *, tokens: int = 1, **params: object) -> Submission:
    return Submission(
        request_id=name,
        prompt_token_ids=[7] * tokens,
        params=SamplingParams(**{"max_tokens": 2, **params}),
    )


def test_everything_comes_back_once() -> None:
    engine = FakeEngine(None)
    source = [submission(str(i), max_tokens=1 + i % 5, n=1 + i % 2) for i in range(23)]
    outputs = list(drive(engine, iter(source), max_in_flight=5))
    assert sorted(int(output.request_id) for output in outputs) == list(range(23))
    assert engine.most_in_flight <= 6


def test_the_source_is_not_read_ahead() -> None:
    pulled = []

    def source():
        for index in range(50):
            pulled.append(index)
            yield submission(str(index))

    outputs = drive(FakeEngine(None), source(), max_in_flight=3)
    next(outputs)
    assert len(pulled) == 3


def test_errors_pass_through_and_refusals_have_numbers() -> None:
    source = [
        failed("a", "bad"),
        submission("b", tokens=70),
        submission("c", tokens=0),
        submission("d"),
    ]
    outputs = {o.request_id: o for o in drive(FakeEngine(None), iter(source), max_in_flight=2)}
    assert outputs["a"].error == "bad"
    assert "prompt 70 tokens, 2 new" in outputs["b"].error
    assert "no tokens" in outputs["c"].error
    assert outputs["d"].completions[0].token_ids == [7, 7]


def test_a_queue_that_is_full_with_nothing_running_is_an_error() -> None:
    outputs = list(drive(FakeEngine(None, max_queue=0), iter([submission("a")]), max_in_flight=2))
    assert "queue is full" in outputs[0].error


def test_a_caller_that_leaves_early_leaves_an_idle_engine() -> None:
    engine = FakeEngine(None)
    outputs = drive(engine, iter([submission("a"), submission("b", max_tokens=9)]), max_in_flight=2)
    assert next(outputs).request_id == "a"
    outputs.close()
    assert not engine.has_work()


def test_steps_are_timed() -> None:
    seconds: list[float] = []
    engine = FakeEngine(None)
    list(
        drive(
            engine, iter([submission("a", max_tokens=4)]), max_in_flight=1, on_step=seconds.append
        )
    )
    assert len(seconds) == engine.steps == 4
    assert all(value >= 0 for value in seconds)


def test_an_engine_failure_reaches_the_caller() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        list(drive(FakeEngine(None, die_after=0), iter([submission("a")]), max_in_flight=1))
