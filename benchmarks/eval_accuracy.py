"""Accuracy of attention settings on any model, through the engine's own prefill and decode.

    python benchmarks/eval_accuracy.py [--model DIR] [--data FILE|FOLDER]
        [--settings dense keys-d4 paper-d4 ...]
    torchrun --nproc-per-node 4 benchmarks/eval_accuracy.py --sp 4   (or deepspeed --num_gpus 4 ...)
    python benchmarks/eval_accuracy.py --merge A.json B.json --name all
                                                     (measures nothing: joins results)

For each setting and length: bits per byte of held-out text by position, KL of the next token's
distribution from dense attention, and exact answers to generated retrieval probes by depth, in a
first or a second turn. Several --seeds are pooled. Weights are loaded once. The output folder gets
NAME.json (after each setting), NAME.md, and NAME.png and NAME-frontier-LENGTH.png (need matplotlib,
extra `bench`). benchmarks/eval/settings.py explains the names of settings.

Exit code 2 if the command cannot run as given.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout not installed
from benchmarks.eval.settings import DEFAULT_SETTINGS, Extents, named_setting, parse_span
from benchmarks.eval.tasks import DEPTHS, TASKS
from sps2_mega.config import DTYPES, EngineConfig, ParallelConfig
from sps2_mega.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    from benchmarks.eval.workload import Amounts
    from sps2_mega.parallel.launcher import LaunchInfo


def main(argv: list[str] | None = None) -> int:
    from sps2_mega.comm.guard import guard
    from sps2_mega.parallel.launcher import from_environment

    args = _parser().parse_args(argv)
    info = from_environment()
    with guard(info):
        try:
            return merge(args) if args.merge else run(args, info)
        except (ConfigError, CheckpointError) as error:
            if info.rank == 0:
                print(f"eval_accuracy: error: {error}", file=sys.stderr)
            return 2


def run(args: argparse.Namespace, info: LaunchInfo) -> int:
    """Measure all settings on this rank; rank 0 writes."""
    from tqdm import tqdm

    from benchmarks.eval.measure import Job
    from benchmarks.eval.report import write_json, write_report
    from benchmarks.eval.study import measure_settings
    from benchmarks.eval.workload import Workload, prepare
    from sps2_mega.comm.collectives import broadcast_bytes
    from sps2_mega.engine.failing import failing
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.mcore.init import finalize, refuse

    config = EngineConfig(
        model=args.model,
        tokenizer=args.tokenizer,
        parallel=ParallelConfig(tp=args.tp, sp=args.sp),
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        max_model_len=max(args.lengths) + 64,
    )
    amounts = _amounts(args)
    try:
        # Every rank prepares, so that a mistake is found on all of them; what is measured is rank
        # 0's.
        names = list(dict.fromkeys(["dense", *args.settings]))
        extents = Extents(
            spans=tuple(map(parse_span, args.spans)),
            sinks=args.sinks,
            halo=args.halo,
            tail=args.tail,
        )
        for name in names:
            named_setting(name, min(args.lengths), extents)
        tokenizer, work = prepare(amounts, config, args.data)
    except (ConfigError, CheckpointError) as error:
        if info.world_size > 1:
            refuse(info, str(error))
        raise
    started = start_rank(config, info, show_progress=info.rank == 0)
    with failing(started.watchdog):
        packed = work.pack() if info.rank == 0 else None
        work = Workload.unpack(broadcast_bytes(packed, started.groups.control))
        facts = _facts(args, started.resolved.name)
        path = args.output / f"{args.name}.json"
        count = sum(len(work.windows[n]) + len(work.probes[n]) for n in args.lengths) * len(names)
        with tqdm(total=count, unit="prompt", disable=info.rank != 0) as bar:

            def on_prompt(name: str) -> None:
                bar.set_description(name, refresh=False)
                bar.update()

            def on_setting(measured: dict[str, Any]) -> None:
                if info.rank == 0:
                    write_json(facts | {"settings": measured}, path)

            measured = measure_settings(
                names,
                Job(config, started),
                tokenizer,
                work,
                amounts,
                extents,
                kl_stride=args.kl_stride,
                on_prompt=on_prompt,
                on_setting=on_setting,
            )
    started.watchdog.close()
    finalize()
    if info.rank == 0:
        write_report(facts | {"settings": measured}, path)
    return 0


def merge(args: argparse.Namespace) -> int:
    """Join results that differ in lengths only, with tables and pictures."""
    from benchmarks.eval.report import merged, write_json, write_report

    results = []
    for path in args.merge:
        if not path.is_file():
            raise ConfigError(f"--merge {path}: no such file")
        results.append(json.loads(path.read_text()))
    result = merged(results, [str(path) for path in args.merge])
    path = args.output / f"{args.name}.json"
    write_json(result, path)
    write_report(result, path)
    return 0


def _amounts(args: argparse.Namespace) -> Amounts:
    from benchmarks.eval.workload import Amounts

    return Amounts(
        lengths=tuple(args.lengths),
        seeds=tuple(dict.fromkeys(args.seeds)),
        texts=args.texts,
        tasks=tuple(args.tasks),
        depths=tuple(args.depths),
        probes=args.probes,
    )


def _facts(args: argparse.Namespace, model: str) -> dict[str, Any]:
    from benchmarks.machine import describe

    return {
        "command": f"python benchmarks/eval_accuracy.py {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "model": model,
        "data": str(args.data or "held-out files of Python's library"),
        "ranks": {"tp": args.tp, "sp": args.sp},
        "seeds": args.seeds,
        "lengths": args.lengths,
        "depths": args.depths,
        "tasks": args.tasks,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=EngineConfig().model, help="as of launch/generate.py (default: bundled)")
    add("--tokenizer", help="tokenizer folder (default: the model's own)")
    add("--data", type=Path, help="text file, JSONL, or folder (default: held-out library files)")
    add("--tp", type=int, default=1)
    add("--sp", type=int, default=1)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="auto", choices=DTYPES)
    add("--threads", type=int, help="CPU threads per rank")
    add("--settings", nargs="+", default=list(DEFAULT_SETTINGS), metavar="NAME")
    add("--spans", nargs="+", default=["1/8", "1/4", "1/2"], metavar="N|P/Q", help="nearest first")
    add("--sinks", type=int, default=16)
    add("--halo", type=int, default=128)
    add("--tail", type=int, default=128)
    add("--lengths", nargs="+", type=int, default=[1024, 2048], metavar="TOKENS")
    add("--texts", type=_positive, default=12, help="held-out windows per length and seed")
    add("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    add("--depths", nargs="+", type=float, default=list(DEPTHS))
    add("--probes", type=_positive, default=4, help="per task, length, depth and seed")
    add("--kl-stride", type=_positive, default=8, help="divergence at every N-th token")
    add(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="of texts and probes; pooled"
    )
    add("--name", default="accuracy", help="of the result files")
    add("--output", type=Path, default=ROOT / "docs" / "results", metavar="FOLDER")
    add(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="put results of other lengths together",
    )
    # Launchers add this flag; the rank is read from the environment.
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
