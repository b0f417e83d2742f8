"""Runs of a comparison: every system tuned on the workload's beginning, then at every rate."""

from __future__ import annotations

import time

from tqdm import tqdm

from sps2_mega.simulator.arrivals import Arrival, scaled
from sps2_mega.simulator.comparison.setting import Outcome, Setting
from sps2_mega.simulator.figures import figures
from sps2_mega.simulator.line_up import ABLATIONS, ablated, candidates, tuned
from sps2_mega.simulator.simulator import simulate
from sps2_mega.simulator.system import System


def run(setting: Setting, *, quiet: bool = False) -> list[Outcome]:
    """Tune and run every system at every rate, slowest rate first.

    Raises:
        ConfigError: no setting of a family fits the GPUs.
    """
    outcomes = []
    for rate in setting.rates:
        arrivals = scaled(setting.arrivals, rate=rate)
        part = arrivals[: setting.tune_on]
        for system in systems_of(setting, part):
            outcomes.append(_outcome(setting, system, rate, arrivals, quiet=quiet))
    return outcomes


def _outcome(
    setting: Setting, system: System, rate: float, arrivals: list[Arrival], *, quiet: bool
) -> Outcome:
    started = time.perf_counter()
    with tqdm(
        total=len(arrivals), desc=f"{system.name} x{rate:g}", disable=quiet, leave=False
    ) as bar:

        def on_finished() -> None:
            bar.update()

        place = setting.place
        found = simulate(arrivals, system, place.model, place.hardware, on_finished=on_finished)
    return Outcome(
        system=system,
        rate=rate,
        figures=figures(found, setting.limits),
        wall_s=time.perf_counter() - started,
    )


def systems_of(setting: Setting, part: list[Arrival]) -> list[System]:
    """Each family at its best setting for this rate, then the ablated ones."""
    systems = []
    for family in setting.families:
        choice = candidates(family, setting.place)
        if choice:
            systems.append(tuned(choice, setting.place, part))
    by_name = {system.name: system for system in systems}
    return systems + [
        ablated(by_name[ABLATIONS[name]], name, setting.place)
        for name in setting.ablations
        if ABLATIONS[name] in by_name
    ]


def document(setting: Setting, outcomes: list[Outcome]) -> dict[str, object]:
    """Setting and outcomes as JSON values."""
    return {
        "setting": setting.name,
        "arguments": setting.arguments,
        "outcomes": [outcome.as_json() for outcome in outcomes],
    }
