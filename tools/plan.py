"""How to lay out a model on the GPUs that you have, for your trace and your limits: the best
setting and the next three.

python tools/plan.py --model llama-3.1-70b --gpu h200 --nodes 4 --trace FILE --slo-ttft 5 --slo-tbt
0.1

Every setting of SPS2 (tp, sp, engines, colocated or split, exact or CSA) and of chunked prefill
serves the trace's beginning in the simulator; the one with most requests per second within the
limits wins, then the one with the shortest responses. Around the best ones chunk sizes, targets,
numbers of engines and shares of GPUs are then tried in smaller steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.simulation.grid import neighbours
from benchmarks.simulation.setting import layout_of
from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival, scaled
from sps2_mega.simulator.figures import Limits, figures
from sps2_mega.simulator.hardware import hardware_names, load_hardware
from sps2_mega.simulator.line_up import Place, candidates
from sps2_mega.simulator.simulator import simulate
from sps2_mega.simulator.step_cost import step_cost
from sps2_mega.simulator.system import System
from sps2_mega.simulator.trace_files import BUNDLED, read_trace
from tools.simulate import full_attention

EXACT = ("sarathi", "sps2", "sps2-yield")
SPARSE = ("sps2-csa", "sps2-split")
_REFINED = (
    3  # so many of the best have their neighbours tried, as often as that finds something better
)
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A setting, and what the simulator expects of it."""

    system: System
    figures: dict[str, Any]


def in_order(found: Sequence[Plan]) -> list[Plan]:
    """Best first: fewest refusals, most goodput, shortest responses. Goodputs of half a percent's
    difference are equal: which requests just miss a limit is chance."""
    best = max((plan.figures["goodput"] for plan in found), default=0.0) or 1.0

    def key(plan: Plan) -> tuple[int, float, float]:
        response = plan.figures["response_s"]
        mean = response["mean"] if response else float("inf")
        return plan.figures["refused"], round(1.0 - plan.figures["goodput"] / best, 2), mean

    return sorted(found, key=key)


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        found = plans(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found[:4], args))
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    found.add_argument("--model", required=True, help="a name in model_configs/")
    found.add_argument("--gpu", required=True, help=f"{', '.join(hardware_names())}, or a file")
    found.add_argument("--nodes", type=int, default=1, help="nodes, with all their GPUs")
    found.add_argument("--link", help="link between nodes, a name in hardware/links.yaml")
    found.add_argument("--trace", default="mooncake", help=f"{', '.join(BUNDLED)}, or a file")
    found.add_argument("--requests", type=int, default=200, help="of the trace's beginning")
    found.add_argument("--rate", type=float, default=1.0, help="times the trace's")
    found.add_argument("--slo-ttft", type=float, default=5.0, help="seconds")
    found.add_argument("--slo-tbt", type=float, default=0.1, help="seconds")
    found.add_argument("--exact", action="store_true", help="no sparse attention")
    found.add_argument("--far-degree", type=int, default=4, help="CSA: one far key in so many")
    found.add_argument("--quiet", action="store_true", help="no progress bar")
    return found


def plans(args: argparse.Namespace) -> list[Plan]:
    """All settings, best first.

    Raises:
        ConfigError: a name is unknown, or nothing fits.
    """
    hardware = load_hardware(args.gpu, inter_node=args.link)
    if args.nodes < 1 or args.requests < 1:
        raise ConfigError(f"needs at least 1 node and 1 request, got {args.nodes}, {args.requests}")
    place = Place(
        model=full_attention(named_model_file(args.model).config, args.model),
        hardware=hardware,
        gpus=args.nodes * hardware.gpus_per_node,
        far_degree=args.far_degree,
    )
    arrivals = scaled(read_trace(args.trace, limit=args.requests), rate=args.rate)
    limits = Limits(ttft_s=args.slo_ttft, tbt_s=args.slo_tbt)
    return ranked(place, arrivals, limits, exact=args.exact, quiet=args.quiet)


def ranked(
    place: Place,
    arrivals: Sequence[Arrival],
    limits: Limits,
    *,
    exact: bool = False,
    quiet: bool = True,
) -> list[Plan]:
    """All settings that were tried, best first.

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
    """Every setting that is tried; of split ones both kinds of attention."""
    families = EXACT if exact else (*EXACT, *SPARSE)
    found = [system for family in families for system in candidates(family, place)]
    if exact:
        dense = System(name="dense").csa
        found += [system.replace(csa=dense) for system in candidates("sps2-split", place)]
    return found


def table(found: Sequence[Plan], args: argparse.Namespace) -> str:
    """Markdown, best first."""
    lines = [
        f"{args.model} on {args.nodes} nodes of {args.gpu}, {args.trace} at {args.rate:g} times "
        "its rate; "
        f"limits {args.slo_ttft:g} s TTFT, {args.slo_tbt:g} s TBT. Simulated.",
        "",
        "| | setting | transport of a 32K prompt | CSA degrees | good requests | goodput | TTFT "
        "mean | p99 | "
        "TBT p99 | response |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    hardware = load_hardware(args.gpu, inter_node=args.link)
    model = full_attention(named_model_file(args.model).config, args.model)
    for place, plan in enumerate(found, 1):
        system, seen = plan.system, plan.figures
        cost = step_cost(system, model, hardware, tp=system.tp, sp=system.sp)
        ttft, tbt, response = (seen[key] or {} for key in ("ttft_s", "tbt_s", "response_s"))
        cells = [
            str(place),
            f"{system.name}: {layout_of(system)}",
            cost.transport_of(32_768) if system.sp > 1 else "",
            "" if system.csa.exact else ",".join(map(str, system.csa.level_degrees)),
            "" if seen["good_share"] is None else f"{seen['good_share']:.0%}",
            f"{seen['goodput']:.3g} /s",
            *(f"{ttft.get(key, 0.0):.3g} s" for key in ("mean", "p99")),
            f"{tbt.get('p99', 0.0) * 1e3:.3g} ms",
            f"{response.get('mean', 0.0):.3g} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tried(system: System, place: Place, arrivals: Sequence[Arrival], limits: Limits) -> Plan:
    """What the simulator expects of one setting."""
    run = simulate(arrivals, system, place.model, place.hardware)
    return Plan(system=system, figures=figures(run, limits))


if __name__ == "__main__":
    sys.exit(main())
