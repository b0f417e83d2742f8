"""TBT under prefill: disturbed gaps, the best system, and a run against a live server."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_engine import FakeEngine
from fake_server import MODEL, serving

from benchmarks.load.client import Target
from benchmarks.load.stretched_model import stretched
from benchmarks.load.tbt_run import Trace, Watched, watch
from benchmarks.serving_tbt import SYSTEMS, best_of, figures, line


def trace(**changes: object) -> Trace:
    usual = {
        "decodes": 2,
        "decode_prompt": 3,
        "prompts": 2,
        "prompt_len": 9,
        "pause_s": 0.1,
        "output_len": 5000,
        "timeout_s": 20.0,
    }
    return Trace(**{**usual, **changes})  # type: ignore[arg-type]


def test_a_gap_that_overlaps_a_prefill_is_disturbed() -> None:
    run = Watched(
        prefills=[(1.0, 2.0)],
        gaps=[(0.0, 1.0), (0.9, 1.1), (1.2, 1.3), (1.9, 2.5), (0.5, 3.0), (2.0, 2.25)],
    )
    quiet, disturbed = run.parted()
    assert quiet == [1.0, 0.25]
    assert disturbed == pytest.approx([0.2, 0.1, 0.6, 2.5])


def test_figures_are_of_all_rounds() -> None:
    first = Watched(prefills=[(1.0, 2.0)], gaps=[(0.0, 0.5), (1.0, 2.0)])
    second = Watched(prefills=[(1.0, 4.0)], gaps=[(0.0, 0.5), (1.0, 2.0)])
    found = figures([first, second])
    assert found["disturbed_gaps"] == 2
    assert found["ttft_s"]["max"] == 3.0
    assert found["p99_over_quiet_p50"] == pytest.approx(2.0)
    assert "2.0 times the quiet median" in line(found)
    alone = figures([Watched(prefills=[(1.0, 2.0)], gaps=[])])
    assert alone["quiet_tbt_s"] is None
    assert "p99_over_quiet_p50" not in alone
    assert line(alone)


def test_the_best_of_its_kind_keeps_the_limit_at_the_shortest_ttft() -> None:
    def system(ratio: float, ttft: float) -> dict:
        return {
            "p99_over_quiet_p50": ratio,
            "ttft_s": {"mean": ttft},
            "disturbed_tbt_s": {"p99": ratio / 100},
        }

    systems = {"a-1": system(1.5, 9.0), "a-2": system(2.9, 4.0), "a-3": system(8.0, 2.0)}
    assert best_of(systems, "a-") == "a-2"
    assert best_of({name: system(8.0 + i, 1.0) for i, name in enumerate(systems)}, "a-") == "a-1"
    assert best_of(systems, "b-") is None


def test_default_systems_have_names_and_flags() -> None:
    names = [text.partition("=")[0] for text in SYSTEMS]
    assert len(set(names)) == len(names) >= 3
    assert all("--" in text.partition("=")[2] for text in SYSTEMS)


def test_decodes_run_on_while_prompts_come() -> None:
    with serving(FakeEngine(None, max_model_len=10_000, step_s=0.01)) as server:
        target = Target(url=server.url, model=MODEL, extra={"logprobs": 0})
        run = asyncio.run(watch(target, trace()))
        quiet, disturbed = run.parted()
        assert len(run.prefills) == 2
        assert all(over > due for due, over in run.prefills)
        # Two requests, three pauses of 0.1 s, a step of 0.01 s.
        assert len(quiet) > 10
        assert disturbed
        assert min(quiet + disturbed) > 0
        while server.async_engine.num_open:  # the client abandoned decodes, and the server noticed
            server.get("/health")


def test_decodes_that_end_early_are_told() -> None:
    with serving(FakeEngine(None, max_model_len=10_000, step_s=0.01)) as server:
        target = Target(url=server.url, model=MODEL, extra={"logprobs": 0})
        with pytest.raises(RuntimeError, match="did not last to the end"):
            asyncio.run(watch(target, trace(output_len=4)))
        with pytest.raises(RuntimeError, match="context_length_exceeded"):
            asyncio.run(watch(target, trace(prompt_len=20_000)))


def test_a_stretched_model_has_the_same_files_and_a_longer_context(tmp_path) -> None:
    folder = stretched("sps2-tiny", 32768, tmp_path)
    config = json.loads((tmp_path / "sps2-tiny" / "config.json").read_text())
    assert config["max_position_embeddings"] == 32768
    assert config["hidden_size"] == 256
    assert (tmp_path / "sps2-tiny" / "model.safetensors").stat().st_size > 10**6
    assert folder == str(tmp_path / "sps2-tiny")
