"""`sps2 plan`: the best layout of a model on your GPUs, for your trace and your limits.

    sps2 plan --model llama-3.1-70b --gpu h200 --nodes 4 --trace FILE --slo-ttft 5 --slo-tbt 0.1

Every setting of SPS2 (tp, sp, engines, colocated or split, exact or CSA) and of chunked prefill
serves the trace's beginning in the simulator; the one with most requests per second within the
limits wins, then the one with the shortest responses. Around the best ones chunk sizes, targets,
numbers of engines and shares of GPUs are then tried in smaller steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sps2_mega.cli.simulated_model import simulated_model
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import scaled
from sps2_mega.simulator.comparison.best_settings import Plan, ranked
from sps2_mega.simulator.comparison.setting import layout_of
from sps2_mega.simulator.figures import Limits
from sps2_mega.simulator.hardware import hardware_names, load_hardware
from sps2_mega.simulator.line_up import Place
from sps2_mega.simulator.step_cost import step_cost
from sps2_mega.simulator.trace_files import BUNDLED, read_trace


def main(argv: Sequence[str] | None = None, *, prog: str = "sps2 plan") -> int:
    """Print the best settings; exit code 2 where there is none."""
    args = parser(prog).parse_args(argv)
    try:
        found = plans(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found[:4], args))
    return 0


def parser(prog: str = "sps2 plan") -> argparse.ArgumentParser:
    """Flags of the command."""
    found = argparse.ArgumentParser(
        prog=prog,
        description="Lay out a model on your GPUs for your trace and limits: the best setting and "
        "the next three.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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
    """All plans, best first.

    Raises:
        ConfigError: a name is unknown, or nothing fits.
    """
    hardware = load_hardware(args.gpu, inter_node=args.link)
    if args.nodes < 1 or args.requests < 1:
        raise ConfigError(f"needs at least 1 node and 1 request, got {args.nodes}, {args.requests}")
    place = Place(
        model=simulated_model(args.model),
        hardware=hardware,
        gpus=args.nodes * hardware.gpus_per_node,
        far_degree=args.far_degree,
    )
    arrivals = scaled(read_trace(args.trace, limit=args.requests), rate=args.rate)
    limits = Limits(ttft_s=args.slo_ttft, tbt_s=args.slo_tbt)
    return ranked(place, arrivals, limits, exact=args.exact, quiet=args.quiet)


def table(found: Sequence[Plan], args: argparse.Namespace) -> str:
    """Markdown table of plans, in their order."""
    lines = [
        f"{args.model} on {args.nodes} nodes of {args.gpu}, {args.trace} at {args.rate:g} times "
        f"its rate; limits {args.slo_ttft:g} s TTFT, {args.slo_tbt:g} s TBT. Simulated.",
        "",
        "| | setting | transport of a 32K prompt | CSA degrees | good requests | goodput | TTFT "
        "mean | p99 | TBT p99 | response |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    hardware = load_hardware(args.gpu, inter_node=args.link)
    model = simulated_model(args.model)
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
