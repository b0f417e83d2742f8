"""Measures what attention settings cost in accuracy, on any model, through the engine's own prefill and decode.

    python tools/eval_accuracy.py [--model DIR] [--data FILE|FOLDER] [--settings dense keys-d4 paper-d4 ...]
    torchrun --nproc-per-node 4 tools/eval_accuracy.py --sp 4          (or deepspeed --num_gpus 4 ...)

For each setting and length: bits per byte of held-out text by position, KL of the next token's distribution from
dense attention, and exact answers to generated retrieval probes by depth. Prefill follows the setting, decode is
always dense. Weights are loaded once. The output folder gets NAME.json (after each setting), NAME.md and NAME.png
(needs matplotlib, extra `bench`). Names of settings are explained in tools/eval/settings.py.

Exit code 2 when the command cannot run as given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout not installed
from sps2_mega.config import DTYPES, EngineConfig, ParallelConfig
from sps2_mega.errors import CheckpointError, ConfigError
from tools.eval.settings import DEFAULT_SETTINGS, Extents, cost, csa_config, parse_span
from tools.eval.tasks import DEPTHS, TASKS, Probe, make_probe

ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    from sps2_mega.engine.tokenizer import Tokenizer
    from sps2_mega.parallel.launcher import LaunchInfo


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every setting is measured on, by length."""

    windows: dict[int, list[list[int]]]
    probes: dict[int, list[Probe]]


def main(argv: list[str] | None = None) -> int:
    from sps2_mega.comm.guard import guard
    from sps2_mega.parallel.launcher import from_environment

    args = _parser().parse_args(argv)
    info = from_environment()
    with guard(info):
        try:
            return run(args, info)
        except (ConfigError, CheckpointError) as error:
            if info.rank == 0:
                print(f"eval_accuracy: error: {error}", file=sys.stderr)
            return 2


def run(args: argparse.Namespace, info: LaunchInfo) -> int:
    """All settings on this rank; rank 0 writes."""
    from sps2_mega.comm.collectives import broadcast_bytes
    from sps2_mega.engine.startup import failing, start_rank
    from sps2_mega.mcore.init import finalize, refuse
    from tools.eval.measure import Job

    config = EngineConfig(
        model=args.model,
        tokenizer=args.tokenizer,
        parallel=ParallelConfig(tp=args.tp, sp=args.sp),
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        max_model_len=max(args.lengths) + 64,
    )
    try:
        # Every rank prepares, so that a mistake is found on all of them; what is measured is rank 0's.
        settings = list(dict.fromkeys(["dense", *args.settings]))
        extents = Extents(
            spans=tuple(map(parse_span, args.spans)),
            sinks=args.sinks,
            halo=args.halo,
            tail=args.tail,
        )
        for name in settings:
            csa_config(name, min(args.lengths), extents)
        tokenizer, work = prepare(args, config)
    except (ConfigError, CheckpointError) as error:
        if info.world_size > 1:
            refuse(info, str(error))
        raise
    started = start_rank(config, info, show_progress=info.rank == 0)
    with failing(started.lifeline):
        packed = json.dumps(dataclasses.asdict(work)).encode() if info.rank == 0 else None
        work = unpack(broadcast_bytes(packed, started.groups.control))
        result = measure_all(args, Job(config, started), tokenizer, work, settings, extents)
    started.lifeline.close()
    finalize()
    if info.rank == 0:
        write(args, result, final=True)
    return 0


def prepare(args: argparse.Namespace, config: EngineConfig) -> tuple[Tokenizer, Workload]:
    """Tokenizer, windows and probes of all lengths."""
    from sps2_mega.checkpoint.resolve import resolve_model
    from sps2_mega.engine.tokenizer import Tokenizer
    from tools.eval.texts import load_texts, windows

    resolved = resolve_model(config.model, tokenizer=config.tokenizer)
    if resolved.tokenizer is None:
        raise ConfigError(f"{config.model} has no tokenizer: name one with --tokenizer")
    tokenizer = Tokenizer.load(resolved.tokenizer)
    texts = load_texts(args.data)
    work = Workload(windows={}, probes={})
    for length in args.lengths:
        work.windows[length] = windows(
            texts, tokenizer, length=length, count=args.texts, seed=args.seed
        )
        work.probes[length] = [
            make_probe(
                task,
                length=length,
                depth=depth,
                index=index,
                seed=args.seed,
                texts=texts,
                tokenizer=tokenizer,
            )
            for task in args.tasks
            for depth in args.depths
            for index in range(args.probes)
        ]
    return tokenizer, work


def unpack(packed: bytes) -> Workload:
    given = json.loads(packed)
    return Workload(
        windows={int(length): found for length, found in given["windows"].items()},
        probes={
            int(length): [Probe(**p) for p in found] for length, found in given["probes"].items()
        },
    )


def measure_all(
    args: argparse.Namespace,
    job: Any,
    tokenizer: Tokenizer,
    work: Workload,
    settings: list[str],
    extents: Extents,
) -> dict[str, Any]:
    from tqdm import tqdm

    from tools.bench.machine import describe
    from tools.eval.measure import answer_probes, score_texts, text_measures

    model = job.started.resolved.config
    driver = job.started.groups.global_rank == 0
    result: dict[str, Any] = {
        "command": f"python tools/eval_accuracy.py {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "model": job.started.resolved.name,
        "data": str(args.data or "held-out files of Python's library"),
        "ranks": {"tp": args.tp, "sp": args.sp},
        "seed": args.seed,
        "lengths": args.lengths,
        "depths": args.depths,
        "tasks": args.tasks,
        "settings": {},
    }
    count = sum(len(work.windows[n]) + len(work.probes[n]) for n in args.lengths)
    dense: dict[int, Any] = {}
    with tqdm(total=count * len(settings), unit="prompt", disable=not driver) as bar:
        for name in settings:
            bar.set_description(name)
            measured = result["settings"][name] = {}
            for length in args.lengths:
                csa = csa_config(name, length, extents)
                scores = score_texts(
                    job,
                    csa,
                    work.windows[length],
                    tokenizer,
                    stride=args.kl_stride,
                    on_done=bar.update,
                )
                dense.setdefault(length, scores)
                probes = work.probes[length]
                verdicts = answer_probes(job, csa, probes, tokenizer, on_done=bar.update)
                measured[str(length)] = {
                    "csa": dataclasses.asdict(csa),
                    "cost": dataclasses.asdict(cost(csa, length, model)),
                    "text": text_measures(scores, dense[length], args.tail),
                    "tasks": by_task(args, probes, verdicts),
                }
            if driver:
                write(args, result, final=False)
    return result


def by_task(
    args: argparse.Namespace, probes: list[Probe], verdicts: list[tuple[bool, float]]
) -> dict[str, Any]:
    """Share of exact answers, and of answers' first characters, per task; exact ones per depth too."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    found = {}
    for task in args.tasks:
        mine = [(p, v) for p, v in zip(probes, verdicts, strict=True) if p.task == task]
        found[task] = {
            "exact": mean([v[0] for _, v in mine]),
            "prefix": mean([v[1] for _, v in mine]),
            "depths": {
                str(depth): mean([v[0] for p, v in mine if p.depth == depth])
                for depth in args.depths
            },
            "num_probes": len(mine),
        }
    return found


def write(args: argparse.Namespace, result: dict[str, Any], *, final: bool) -> None:
    from tools.eval.report import heatmap, markdown

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    if not final:
        return
    table = markdown(result)
    path.with_suffix(".md").write_text(table)
    print(table)
    if args.tasks:
        try:
            heatmap(result, path.with_suffix(".png"))
        except ModuleNotFoundError as error:
            print(f"no picture: {error}; install the extra 'bench'", file=sys.stderr)
    print(f"written: {path}")


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
    add("--spans", nargs="+", default=["1/8", "1/2"], metavar="N|P/Q", help="nearest first")
    add("--sinks", type=int, default=16)
    add("--halo", type=int, default=128)
    add("--tail", type=int, default=128)
    add("--lengths", nargs="+", type=int, default=[1024, 2048], metavar="TOKENS")
    add("--texts", type=_positive, default=12, help="held-out windows per length")
    add("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    add("--depths", nargs="+", type=float, default=list(DEPTHS))
    add("--probes", type=_positive, default=4, help="per task, length and depth")
    add("--kl-stride", type=_positive, default=8, help="divergence at every N-th token")
    add("--seed", type=int, default=0, help="of texts and probes")
    add("--name", default="accuracy", help="of the result files")
    add("--output", type=Path, default=ROOT / "docs" / "results", metavar="FOLDER")
    # Launchers add this one; the rank comes from the environment.
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
