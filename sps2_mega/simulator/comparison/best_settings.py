"""Search for the best setting of a place: all layouts, then neighbours of the best ones.

Best is most requests per second within the limits, then shortest responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.comparison.neighbours import neighbours
from sps2_mega.simulator.figures import Limits, figures
from sps2_mega.simulator.line_up import Place, candidates
from sps2_mega.simulator.simulator import simulate
from sps2_mega.simulator.system import System

EXACT = ("sarathi", "sps2", "sps2-yield")
SPARSE = ("sps2-csa", "sps2-split")
_REFINED = 3  # the best ones, whose neighbours are tried
_ROUNDS = 3  # at most, for as long as neighbours are new


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A setting, and its simulated figures."""

    system: System
    figures: dict[str, Any]


def in_order(found: Sequence[Plan]) -> list[Plan]:
    """Plans, best first: fewest refusals, most goodput, shortest responses.

    Goodputs that differ by half a percent are equal: which requests just miss a limit is chance.
    """
    best = max((plan.figures["goodput"] for plan in found), default=0.0) or 1.0

    def key(plan: Plan) -> tuple[int, float, float]:
        response = plan.figures["response_s"]
        mean = response["mean"] if response else float("inf")
        return plan.figures["refused"], round(1.0 - plan.figures["goodput"] / best, 2), mean

    return sorted(found, key=key)


def ranked(
    place: Place,
    arrivals: Sequence[Arrival],
    limits: Limits,
    *,
    exact: bool = False,
    quiet: bool = True,
) -> list[Plan]:
    """All plans that were tried, best first.

    Raises:
        ConfigError: nothing fits.
    """
    found: list[Plan] = []
    following = settings(place, exact=exact)
    for _ in range(1 + _ROUNDS):
        for system in tqdm(following, disable=quiet, leave=False):
            found.append(tried(system, place, arrivals, limits))
        found = in_order(found)
        known = [plan.system for plan in found]
        following = []
        for plan in found[:_REFINED]:
            near = neighbours(plan.system, place)
            following += [system for system in near if system not in [*known, *following]]
        if not following:
            break
    return found


def settings(place: Place, *, exact: bool) -> list[System]:
    """Settings to start from; split ones with both kinds of attention."""
    families = EXACT if exact else (*EXACT, *SPARSE)
    found = [system for family in families for system in candidates(family, place)]
    if exact:
        dense = System(name="dense").csa
        found += [system.replace(csa=dense) for system in candidates("sps2-split", place)]
    return found


def tried(system: System, place: Place, arrivals: Sequence[Arrival], limits: Limits) -> Plan:
    """One setting, simulated."""
    run = simulate(arrivals, system, place.model, place.hardware)
    return Plan(system=system, figures=figures(run, limits))
