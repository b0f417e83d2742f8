"""End of `generate` where it starts the other ranks itself: who ends them, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sps2_mega.comm import watchdog
from sps2_mega.config import EngineConfig, ParallelConfig
from sps2_mega.engine import start
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.serving import generate, local_ranks

CONFIG = EngineConfig(parallel=ParallelConfig(tp=2))


def job(error: Exception | None = None) -> Any:
    def run(engine: object) -> int:
        if error is not None:
            raise error
        return 0

    return SimpleNamespace(run=run)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `close` of the started ranks was called with; an engine that does nothing drives."""
    calls: list[bool] = []

    class Ranks:
        info = from_environment({})

        def __init__(self, config: EngineConfig) -> None:
            assert config is CONFIG

        def close(self, *, told: bool = True) -> None:
            calls.append(told)

    engine = SimpleNamespace(shutdown=lambda: None)
    monkeypatch.setattr(local_ranks, "LocalRanks", Ranks)
    monkeypatch.setattr(start, "start_driver", lambda *_, **__: engine)
    return calls


def run(error: Exception | None = None) -> int:
    return generate._run(job(error), CONFIG, from_environment({}), starts_ranks=True)


def test_ranks_get_time_to_leave_after_the_shutdown(closed: list[bool]) -> None:
    assert run() == 0
    assert closed == [True]


def test_ranks_that_have_not_met_are_ended_with_the_error(closed: list[bool]) -> None:
    with pytest.raises(ConfigError):
        run(ConfigError("no"))
    assert closed == [False]


def test_ranks_that_have_met_are_left_to_the_guard(
    closed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their end would be reported as the reason, in place of the full disk.
    monkeypatch.setattr(watchdog, "active_watchdogs", lambda: (object(),))
    with pytest.raises(OSError, match="No space left"):
        run(OSError(28, "No space left on device"))
    assert closed == []
