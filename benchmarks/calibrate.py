"""Measure this machine for the simulator and write a hardware file: rates, overheads and links.

    python benchmarks/calibrate.py --output out/mine.yaml                        one rank
    torchrun --nproc-per-node 8 benchmarks/calibrate.py --model llama-3-8b --output out/node.yaml
    deepspeed --hostfile hosts benchmarks/calibrate.py --output out/cluster.yaml
                                                         links inside nodes and between them
    sudo python benchmarks/calibrate.py --nodes 2 --rates 10gbit,1gbit --output out/two.yaml
        --one-rank out/one.yaml

    python tools/simulate.py --hardware out/node.yaml ..

All ranks measure at once, so what they share counts. With --nodes the ranks run in network
namespaces, one in each, as in cluster.py, and the file has one link per rate (`--link
between-1gbit`). `calibration.terms` describes the measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.emulated.nodes import ClusterError, parse_rates
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--output", type=Path, required=True, help="the hardware file, ends in .yaml")
    made.add_argument(
        "--model",
        default="sps2-tiny",
        help="whose widths: of model_configs/, a folder, gqa, mha or wide",
    )
    made.add_argument("--tokens", type=int, help="of the timed layer (4096 on CPU, 8192 on CUDA)")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--dtype", default="auto", help="auto: the model's on CUDA, float32 on CPU")
    made.add_argument("--nodes", type=int, default=0, help="emulate so many nodes (root)")
    made.add_argument(
        "--one-rank",
        type=Path,
        metavar="FILE",
        help="with --nodes: one rank alone in turn with them",
    )
    made.add_argument("--rates", default="free", help="with --nodes: link rates as tc writes them")
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        outputs = [path for path in (args.output, args.one_rank) if path is not None]
        for path in outputs:
            if path.suffix != ".yaml":
                raise ConfigError(f"--output and --one-rank must end in .yaml, got {path}")
        if args.one_rank is not None and not args.nodes:
            raise ConfigError("--one-rank goes with --nodes; without, start one rank")
        if args.tokens is not None and args.tokens < 2:
            raise ConfigError(f"--tokens must be >= 2, got {args.tokens}")
        for path in outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
        written: dict[Path, str] = {}
        if args.nodes:
            for written in on_emulated_nodes(args):
                _write(written)
        elif (text := on_this_rank(args)) is not None:
            written = {args.output: text}
            _write(written)
    except (ConfigError, ClusterError, OSError, ValueError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"written: {path}")
    return 0


def _write(texts: dict[Path, str]) -> None:
    for path, text in texts.items():
        path.write_text(text)


def on_this_rank(args: argparse.Namespace) -> str | None:
    """Text of the hardware file, on rank 0 of the job that this process belongs to."""
    import torch

    from benchmarks.calibration import nodes
    from benchmarks.calibration.file import hardware_text
    from benchmarks.calibration.steps import probe_for, tp_step_s
    from benchmarks.calibration.terms import measure
    from sps2_mega.comm.guard import guard
    from sps2_mega.parallel.launcher import from_environment

    info = from_environment()
    if args.device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(1)  # a rank is a core, as in the other tools
    wanted = os.environ.get(nodes.AS_JSON)  # given by the process that emulates nodes
    with guard(info):
        if wanted == nodes.TP_STEP:
            probe = probe_for(model_of(args.model), args.dtype)
            seconds = tp_step_s(probe, info, device=args.device, dtype=args.dtype)
            return None if seconds is None else json.dumps(seconds)
        terms = measure(
            model_of(args.model), info, tokens=args.tokens, device=args.device, dtype=args.dtype
        )
    if terms is None:
        return None
    if wanted == nodes.TERMS:
        return json.dumps(dataclasses.asdict(terms))
    return hardware_text(terms, model=args.model, command=_command(), date=_today())


def on_emulated_nodes(args: argparse.Namespace) -> Iterator[dict[Path, str]]:
    """Yield the texts of the files after each rate, fastest rate first.

    Raises:
        ClusterError: this machine cannot emulate nodes, or a rank failed.
        ValueError: a rate is not one.
    """
    from benchmarks.calibration import nodes
    from benchmarks.calibration.file import hardware_text
    from benchmarks.calibration.steps import probe_for

    device, dtype = "cpu", "float32"
    probe = probe_for(model_of(args.model), dtype).config
    command = [sys.executable, str(Path(__file__).resolve())]
    command += ["--model", args.model, "--device", device, "--dtype", dtype]
    command += ["--tokens", str(args.tokens)] if args.tokens else []
    rates = parse_rates(args.rates.split(","))
    how: dict[str, str] = {"model": args.model, "command": _command(), "date": _today()}
    for found in nodes.on_emulated_nodes(
        args.nodes, rates, command, probe, with_one_rank=args.one_rank is not None
    ):
        texts = {args.output: hardware_text(found.terms, between=found.between, **how)}
        if found.alone is not None:
            texts[args.one_rank] = hardware_text(found.alone, **how)
        yield texts


def model_of(name: str) -> ModelConfig:
    """Model of a name in model_configs/, of a model folder, or of a shape of cluster.py.

    Raises:
        ConfigError: none of these.
    """
    from benchmarks.emulated.systems import SHAPES, shape_config
    from sps2_mega.checkpoint.resolve import resolve_model

    shape = SHAPES.get(name)
    if shape is not None and shape.llama is not None:
        return shape_config(shape)
    return resolve_model(name).config


def _command() -> str:
    return f"python benchmarks/calibrate.py {shlex.join(sys.argv[1:])}".strip()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


if __name__ == "__main__":
    sys.exit(main())
