"""`sps2 simulate`: replay a request trace through SPS2 and its rivals on simulated clusters.

    sps2 simulate --model llama-3-8b --hardware h100 --gpus 16 --trace mooncake --rates 0.5 1 2 4
    sps2 simulate --model yi-34b --hardware a100-80g --link rdma-100g --trace azure-code --length 8

Every system is first tuned on the beginning of the workload (layouts, chunk sizes), then serves all
of it at each rate. Prints tables; writes JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sps2_mega.cli.simulated_model import simulated_model
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival, scaled
from sps2_mega.simulator.comparison.report import as_text, ratio_table
from sps2_mega.simulator.comparison.runs import document, run
from sps2_mega.simulator.comparison.setting import Setting
from sps2_mega.simulator.figures import Limits
from sps2_mega.simulator.hardware import hardware_names, load_hardware
from sps2_mega.simulator.line_up import ABLATIONS, FAMILIES, Place
from sps2_mega.simulator.poisson import poisson
from sps2_mega.simulator.trace_files import BUNDLED, read_trace

DEFAULT_FAMILIES = (
    "sarathi",
    "sarathi-large",
    "whole-prompts",
    "ring",
    "ulysses",
    "sps2",
    "sps2-yield",
    "sps2-csa",
    "sps2-split",
)

_NOT_RECORDED = ("output", "quiet", "no_pictures")  # they change nothing in the numbers


def main(argv: Sequence[str] | None = None, *, prog: str = "sps2 simulate") -> int:
    """Run one comparison; exit code 2 where it cannot be simulated."""
    args = parser(prog).parse_args(argv)
    try:
        setting = setting_of(args)
        outcomes = run(setting, quiet=args.quiet)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_text(setting, outcomes))
    print()
    print(ratio_table([(setting.name, outcomes)]))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(document(setting, outcomes), indent=1) + "\n")
        if not args.no_pictures:
            from sps2_mega.simulator.comparison.pictures import draw

            draw(setting.name, outcomes, args.output.with_suffix(".png"))
    return 0


def parser(prog: str = "sps2 simulate") -> argparse.ArgumentParser:
    """Flags of the command."""
    found = argparse.ArgumentParser(
        prog=prog,
        description="Replay a request trace through SPS2 and its rivals on a simulated cluster; "
        "print tables, write JSON and pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument("--model", default="llama-3-8b", help="a name in model_configs/")
    found.add_argument(
        "--hardware", default="h100", help=f"{', '.join(hardware_names())}, or a file"
    )
    found.add_argument("--link", help="link between nodes, a name in hardware/links.yaml")
    found.add_argument("--gpus", type=int, default=16, help="GPUs that every system gets")
    found.add_argument("--trace", default="mooncake", help=f"{', '.join(BUNDLED)}, or a file")
    found.add_argument("--requests", type=int, default=1000, help="of the trace's beginning")
    found.add_argument("--rates", type=float, nargs="+", default=[1.0], help="times the trace's")
    found.add_argument("--length", type=float, default=1.0, help="prompts this many times as long")
    found.add_argument("--poisson", action="store_true", help="lengths of the trace, but Poisson")
    found.add_argument("--seed", type=int, default=0, help="of Poisson arrivals and drawn traces")
    found.add_argument("--systems", nargs="+", default=list(DEFAULT_FAMILIES), choices=FAMILIES)
    found.add_argument("--ablations", action="store_true", help=f"also {', '.join(ABLATIONS)}")
    found.add_argument("--far-degree", type=int, default=4, help="CSA: one far key in so many")
    found.add_argument("--tune-on", type=int, default=150, help="requests of the tuning runs")
    found.add_argument("--slo-ttft", type=float, default=5.0, help="seconds, for goodput")
    found.add_argument("--slo-tbt", type=float, default=0.1, help="seconds, for goodput")
    found.add_argument("--prefix-caching", action="store_true", help="not with sps2-split")
    found.add_argument("--output", type=Path, help="JSON; a picture is put beside it")
    found.add_argument("--no-pictures", action="store_true")
    found.add_argument("--quiet", action="store_true", help="no progress bar")
    return found


def setting_of(args: argparse.Namespace) -> Setting:
    """Setting of the command line, with the workload at the trace's own rate.

    Raises:
        ConfigError: a name is unknown, or a number out of range.
    """
    if args.gpus < 1 or args.requests < 1 or min(args.rates) <= 0 or args.far_degree < 1:
        raise ConfigError("--gpus, --requests, --rates and --far-degree must be positive")
    hardware = load_hardware(args.hardware, inter_node=args.link)
    place = Place(
        model=simulated_model(args.model),
        hardware=hardware,
        gpus=args.gpus,
        far_degree=args.far_degree,
        prefix_caching=args.prefix_caching,
    )
    return Setting(
        name=f"{args.model}, {args.gpus} x {hardware.name}"
        + (f" over {args.link}" if args.link else "")
        + f", {args.trace}"
        + (f" x {args.length:g}" if args.length != 1 else "")
        + (", Poisson" if args.poisson else "")
        + (", prefix caching" if args.prefix_caching else ""),
        place=place,
        arrivals=tuple(workload(args)),
        rates=tuple(sorted(args.rates)),
        families=tuple(args.systems),
        ablations=tuple(ABLATIONS) if args.ablations else (),
        tune_on=args.tune_on,
        limits=Limits(ttft_s=args.slo_ttft, tbt_s=args.slo_tbt),
        arguments={k: v for k, v in vars(args).items() if k not in _NOT_RECORDED},
    )


def workload(args: argparse.Namespace) -> list[Arrival]:
    """Arrivals of the trace, stretched, and at Poisson times if so asked."""
    arrivals = scaled(
        read_trace(args.trace, limit=args.requests, seed=args.seed), length=args.length
    )
    if args.poisson and len(arrivals) > 1:
        lengths = [(a.prompt_len, a.output_len) for a in arrivals]
        rate = len(arrivals) / max(1e-9, arrivals[-1].time_s)
        arrivals = poisson(lengths, rate=rate, count=len(arrivals), seed=args.seed)
    return arrivals
