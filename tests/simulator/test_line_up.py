"""The systems that are compared, their tuning and ablations, and the figures of a run."""

from __future__ import annotations

import dataclasses

import pytest

from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.figures import Limits, figures
from sps2_mega.simulator.hardware import load_hardware
from sps2_mega.simulator.line_up import ABLATIONS, FAMILIES, Place, ablated, candidates, tuned
from sps2_mega.simulator.simulator import simulate
from sps2_mega.simulator.step_cost import step_cost
from sps2_mega.simulator.system import System
from tests.simulator.small_model import MODEL, ROUND

PLACE = Place(model=MODEL, hardware=ROUND, gpus=8)
PART = [
    Arrival(time_s=0.01 * i, prompt_len=n, output_len=5)
    for i, n in enumerate([1, 63, 12_345, 1000, 1000, 40_000])
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gpus", [4, 8, 16])
def test_every_candidate_uses_all_gpus_and_serves_a_workload(family, gpus):
    place = dataclasses.replace(PLACE, gpus=gpus)
    systems = candidates(family, place)
    assert systems or family in ("sarathi-wide", "vllm-dcp")
    for system in systems:
        assert system.num_gpus == gpus and system.name == family
    for system in systems[:1]:
        assert len(simulate(PART, system, MODEL, ROUND).timings) == len(PART)


def test_weights_decide_the_least_tensor_parallelism():
    big = dataclasses.replace(MODEL, num_layers=80)
    place = dataclasses.replace(PLACE, model=big)
    assert PLACE.min_tp == 1 and place.min_tp == 4
    with pytest.raises(ConfigError, match="need more than 2 GPUs"):
        _ = dataclasses.replace(place, gpus=2).min_tp


def test_the_tuned_system_is_the_best_of_the_candidates():
    systems = candidates("sarathi", PLACE)
    best = tuned(systems, PLACE, PART)

    def mean(system):
        timings = simulate(PART, system, MODEL, ROUND).timings
        return sum(timing.total_s for timing in timings)

    assert mean(best) == min(map(mean, systems))
    with pytest.raises(ConfigError, match="no setting"):
        tuned([], PLACE, PART)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_keeps_the_gpus_and_still_serves(ablation):
    system = candidates("sps2-split", PLACE)[0]
    without = ablated(system, ablation, PLACE)
    assert without.num_gpus == system.num_gpus and without != system
    assert len(simulate(PART, without, MODEL, ROUND).timings) == len(PART)
    with pytest.raises(ConfigError, match="no-magic"):
        ablated(system, "no-magic", PLACE)


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match="'orca' is not one of"):
        candidates("orca", PLACE)


def test_a_sliding_window_is_refused():
    windowed = dataclasses.replace(MODEL, sliding_window=4096)
    with pytest.raises(ConfigError, match="window of 4096"):
        step_cost(System(name="x"), windowed, load_hardware("h100"), tp=1, sp=1)


def test_figures_add_up():
    run = simulate(PART, System(name="one"), MODEL, ROUND)
    found = figures(run, Limits(ttft_s=100.0, tbt_s=100.0))
    assert found["requests"] == found["goodput"] * run.duration_s == 6
    assert sum(found["time_in"].values()) == pytest.approx(found["response_s"]["mean"])
    assert sum(found["step_terms"].values()) == pytest.approx(1.0)
    assert found["tbt_s"]["p50"] <= found["tbt_s"]["p99"]
    assert figures(run, Limits(ttft_s=0.0))["goodput"] == 0.0
    assert found["prompt_tokens_per_s"] == pytest.approx(54_409 / run.duration_s, rel=0.01)


def test_figures_of_no_requests_are_empty():
    found = figures(simulate([], System(name="one"), MODEL, ROUND), Limits())
    assert found["requests"] == 0 and found["ttft_s"] is None and found["good_share"] is None
