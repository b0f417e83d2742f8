"""Measures this machine for the simulator and writes a hardware file: rates, overheads, and the links between its ranks.

    python tools/bench/calibrate.py --output out/mine.yaml                                   one rank
    torchrun --nproc-per-node 8 tools/bench/calibrate.py --model llama-3-8b --output out/node.yaml
    deepspeed --hostfile hosts tools/bench/calibrate.py --output out/cluster.yaml             links of nodes and between
    sudo python tools/bench/calibrate.py --nodes 2 --rates 10gbit,1gbit --output out/emulated.yaml

    python tools/simulate.py --hardware out/node.yaml ..

All ranks measure at once, so what they share counts. With --nodes the ranks run in network namespaces, one in each, as
in cluster.py, and the file has one link per rate (`--link between-1gbit`). How is `calibrate_terms`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError
from tools.bench.cluster_jobs import rank_environment
from tools.bench.cluster_nodes import (
    ClusterError,
    emulated_cluster,
    parse_rates,
    rate_name,
)
from tools.bench.cluster_nodes import Link as Cable
from tools.bench.machine import ROOT

_PORT = 29700
_RANK_S = 600.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--output", type=Path, required=True, help="the hardware file, ends in .yaml")
    made.add_argument(
        "--model", default="sps2-tiny", help="whose widths: model_configs/, a folder, gqa or mha"
    )
    made.add_argument("--tokens", type=int, help="of the timed layer (4096 on CPU, 8192 on CUDA)")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--dtype", default="auto", help="auto: the model's on CUDA, float32 on CPU")
    made.add_argument("--nodes", type=int, default=0, help="emulate so many nodes (root)")
    made.add_argument("--rates", default="free", help="with --nodes: link rates as tc writes them")
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        if args.output.suffix != ".yaml":
            raise ConfigError(f"--output must end in .yaml, got {args.output}")
        if args.tokens is not None and args.tokens < 2:
            raise ConfigError(f"--tokens must be >= 2, got {args.tokens}")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for text in on_emulated_nodes(args) if args.nodes else [on_this_rank(args)]:
            if text is not None:
                args.output.write_text(text)
    except (ConfigError, ClusterError, OSError, ValueError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2
    if text is not None:
        print(f"written: {args.output}")
    return 0


def on_this_rank(args: argparse.Namespace) -> str | None:
    """The file's text on rank 0 of the job that this process belongs to."""
    import torch

    from sps2_mega.comm.guard import guard
    from sps2_mega.parallel.launcher import from_environment
    from tools.bench.calibrate_file import hardware_text
    from tools.bench.calibrate_terms import measure

    info = from_environment()
    if args.device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(1)  # a rank is a core, as in the other tools
    with guard(info):
        terms = measure(
            model_of(args.model), info, tokens=args.tokens, device=args.device, dtype=args.dtype
        )
    if terms is None:
        return None
    if os.environ.get(_AS_JSON):  # for the process that emulates nodes
        return json.dumps(dataclasses.asdict(terms))
    return hardware_text(terms, model=args.model, command=_command(), date=_today())


_AS_JSON = "SPS2_CALIBRATE_JSON"


def on_emulated_nodes(args: argparse.Namespace) -> Iterator[str]:
    """The file's text after each rate, the fastest one first: its terms, and a link for each so far.

    Raises:
        ClusterError: this machine cannot emulate nodes, or a rank failed.
        ValueError: a rate is not one.
    """
    from tools.bench.calibrate_file import hardware_text
    from tools.bench.calibrate_links import MeasuredLink
    from tools.bench.calibrate_terms import Terms

    rates = parse_rates(args.rates.split(","))
    # So that namespaces are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.nodes < 2:
        raise ClusterError(f"--nodes must be at least 2, got {args.nodes}")
    found: dict[str, dict[str, Any]] = {}
    with (
        emulated_cluster(args.nodes) as cluster,
        tempfile.TemporaryDirectory() as folder,
    ):
        for number, rate in enumerate(rates):
            cluster.set_link(Cable(bits_per_s=rate))
            output = Path(folder) / f"{number}.yaml"
            command = [sys.executable, str(Path(__file__).resolve()), "--output", str(output)]
            command += ["--model", args.model, "--device", "cpu", "--dtype", "float32"]
            command += ["--tokens", str(args.tokens)] if args.tokens else []
            ranks = [
                subprocess.Popen(
                    [*node.prefix, *command],
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                    env=os.environ
                    | rank_environment(rank, cluster.nodes, _PORT + number)
                    | {_AS_JSON: "1", "PYTHONPATH": str(ROOT)},
                )
                for rank, node in enumerate(cluster.nodes)
            ]
            try:
                codes = [rank.wait(_RANK_S) for rank in ranks]
            except subprocess.TimeoutExpired:
                raise ClusterError(
                    f"at {rate_name(rate)} ranks did not end within {_RANK_S:g} s"
                ) from None
            finally:
                for rank in ranks:
                    rank.kill()
            if any(codes):
                raise ClusterError(f"at {rate_name(rate)} ranks ended with exit codes {codes}")
            found[f"between-{rate_name(rate)}"] = json.loads(output.read_text())
            print(f"calibrate: {rate_name(rate)} is measured", file=sys.stderr)
            links = {name: MeasuredLink(**terms["links"][-1]) for name, terms in found.items()}
            first = next(iter(found.values()))
            terms = Terms(
                **{
                    k: tuple(v) if isinstance(v, list) else v
                    for k, v in first.items()
                    if k != "links"
                },
                links=tuple(MeasuredLink(**link) for link in first["links"]),
            )
            yield hardware_text(
                terms, model=args.model, command=_command(), date=_today(), between=links
            )


def model_of(name: str) -> ModelConfig:
    """Of a name in model_configs/, of a model folder, or of a shape of cluster.py.

    Raises:
        ConfigError: none of these.
    """
    from sps2_mega.checkpoint.resolve import resolve_model
    from tools.bench.cluster_systems import SHAPES, shape_config

    shape = SHAPES.get(name)
    if shape is not None and shape.llama is not None:
        return shape_config(shape)
    return resolve_model(name).config


def _command() -> str:
    return f"python tools/bench/calibrate.py {shlex.join(sys.argv[1:])}".strip()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


if __name__ == "__main__":
    sys.exit(main())
