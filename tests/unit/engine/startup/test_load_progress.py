"""Progress of a start: stages at once, weights every few seconds, and the same to `on_stage`."""

from __future__ import annotations

import io

import pytest

from sps2_mega.engine.startup.load_progress import LoadProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_stages_and_weights_as_lines(clock) -> None:
    stream, heard = io.StringIO(), []
    progress = LoadProgress(show=True, on_stage=heard.append, stream=stream, clock=clock)
    progress.stage("waiting for 3 other ranks")
    clock.now += 2
    with progress.reading("llama") as on_bytes:
        for done in range(1, 17):  # a GB a second
            clock.now += 1
            on_bytes(done * 10**9, 16 * 10**9)
    assert stream.getvalue().splitlines() == [
        "[   0.0 s] waiting for 3 other ranks",
        "[   2.0 s] reading the weights of llama",
        "[   7.0 s] 31 % of 16.00 GB, 1.00 GB/s, about 11 s left",
        "[  12.0 s] 62 % of 16.00 GB, 1.00 GB/s, about 6 s left",
        "[  17.0 s] 94 % of 16.00 GB, 1.00 GB/s, about 1 s left",
    ]
    assert heard[:3] == [
        "waiting for 3 other ranks",
        "reading the weights of llama",
        "reading the weights of llama: 6 % of 16.00 GB",
    ]
    assert heard[-1].endswith(": 100 % of 16.00 GB")


def test_a_quick_start_says_its_stages_only(clock) -> None:
    stream = io.StringIO()
    progress = LoadProgress(show=True, stream=stream, clock=clock)
    with progress.reading("tiny") as on_bytes:
        on_bytes(1, 1)
    assert stream.getvalue() == "[   0.0 s] reading the weights of tiny\n"


def test_hidden_progress_is_still_heard(clock) -> None:
    stream, heard = io.StringIO(), []
    progress = LoadProgress(show=False, on_stage=heard.append, stream=stream, clock=clock)
    progress.stage("joining")
    with progress.reading("tiny") as on_bytes:
        on_bytes(1, 3)
    assert (stream.getvalue(), heard) == ("", ["joining", "reading the weights of tiny"])


def test_a_terminal_gets_a_bar(clock) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = LoadProgress(show=True, stream=stream, clock=clock)
    with progress.reading("tiny") as on_bytes:
        on_bytes(1, 3)
        clock.now += 60
        on_bytes(2, 3)
    assert "loading tiny" in stream.getvalue()
    assert "GB/s, about" not in stream.getvalue()
