"""Simulate the stored comparisons again, and make all tables and pictures of docs/evaluation.md.

    python benchmarks/evaluate.py           stored comparisons that fit into --minutes, the quickest
                                            first
    python benchmarks/evaluate.py --full    all of them, and `sps2 plan` against an exhaustive
                                            sweep (about 20 minutes on two cores); continues an
                                            interrupted run unless --again is given
    python benchmarks/evaluate.py --list    what would run, and how long it took last time

A stored comparison (docs/results/simulated-*.json) keeps its arguments; the current code simulates
it again with those and replaces it. What is wanted and not stored yet has its arguments in
`simulation.comparisons`. Measured results are not touched. `sps2_mega.cli.simulate` does the work.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import plan_sweep, validate_simulator
from benchmarks.simulation import results
from benchmarks.simulation.combinations import COMBINATIONS
from benchmarks.simulation.comparisons import WANTED
from benchmarks.simulation.document import ROOT
from benchmarks.simulation.unfinished import Unfinished
from benchmarks.simulation.workers import workers
from sps2_mega.cli import simulate
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.comparison.runs import document, run

# Systems of every comparison, also of those stored before these existed.
ALWAYS = ("sps2-yield",)
_TUNING = 3.0  # a whole run takes so many times its last part, where only that was stored
_UNKNOWN_S = 300.0  # of one that was never run: too long for what fits into a few minutes
_SWEEP = "planner: "  # prefix of the names of combinations
UNFINISHED = ROOT / "out" / "evaluate.json"  # done by an interrupted --full


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One result file, the command line that makes it, and its rough duration on one core."""

    path: Path
    arguments: dict[str, Any]
    wall_s: float

    @property
    def name(self) -> str:
        return self.path.stem.removeprefix("simulated-")


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        known = stored()
        chosen = selected(known, args)
    except ConfigError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    left = [item.name for item in known if item not in chosen]
    if args.list:
        for item in known:
            print(f"{'run ' if item in chosen else 'keep'} {item.wall_s:6.0f} s  {item.name}")
        return 0
    began = time.monotonic()
    done = 0
    if args.full:
        unfinished = Unfinished(UNFINISHED, anew=args.again)
        tasks = {
            name: task
            for name, task in all_tasks(known, args).items()
            if name not in unfinished.done
        }
        for name in _completed(tasks, args):
            unfinished.add(name)
            done += 1
    else:
        done = len(list(_completed({item.name: partial(again, item) for item in chosen}, args)))
    _documents()
    if args.full:
        unfinished.finished()
    print(f"{done} comparisons in {(time.monotonic() - began) / 60:.1f} minutes")
    if left:
        print(f"as they were stored (--full runs them too): {', '.join(left)}")
    return 0


def all_tasks(
    known: Sequence[Stored], args: argparse.Namespace
) -> dict[str, Callable[[], dict[str, Any] | None]]:
    """Tasks by name, the longest first: all comparisons or those of --only, else also the sweep."""
    chosen = [item for item in reversed(known) if not args.only or item.name in args.only]
    tasks: dict[str, Callable[[], dict[str, Any] | None]] = {
        item.name: partial(again, item) for item in chosen
    }
    if not args.only:
        tasks |= {_SWEEP + each.name: partial(plan_sweep.swept, each) for each in COMBINATIONS}
    return tasks


def stored() -> list[Stored]:
    """All comparisons stored in docs/results or wanted there, the quickest first."""
    found = []
    for path in results.paths():
        content = json.loads(path.read_text())
        parts = sum(outcome["wall_s"] for outcome in content["outcomes"])
        wall_s = content.get("wall_s") or _TUNING * parts
        found.append(Stored(path=path, arguments=content["arguments"], wall_s=wall_s))
    known = {item.name for item in found}
    for name, flags in WANTED.items():
        if name not in known:
            arguments = vars(simulate.parser().parse_args(shlex.split(flags)))
            path = results.path_of(name)
            found.append(Stored(path=path, arguments=arguments, wall_s=_UNKNOWN_S))
    return sorted(found, key=lambda item: item.wall_s)


def selected(known: Sequence[Stored], args: argparse.Namespace) -> list[Stored]:
    """Comparisons to run.

    Raises:
        ConfigError: there is no comparison of a given name, or a number makes no sense.
    """
    if args.jobs < 1 or args.minutes <= 0:
        raise ConfigError(f"--jobs and --minutes must be positive, got {args.jobs}, {args.minutes}")
    names = [item.name for item in known]
    if unknown := [name for name in args.only if name not in names]:
        raise ConfigError(f"no comparison {', '.join(unknown)}; there are {', '.join(names)}")
    if args.only:
        return [item for item in known if item.name in args.only]
    if args.full:
        return list(known)
    chosen: list[Stored] = []
    room_s = 60.0 * args.minutes * args.jobs
    for item in known:
        # The last one to start must end in time too.
        if item.wall_s <= min(room_s, 60.0 * args.minutes / 2):
            chosen.append(item)
            room_s -= item.wall_s
    return chosen


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--full", action="store_true", help="everything that is simulated")
    made.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these comparisons")
    made.add_argument("--minutes", type=float, default=8.0, help="about how long, without --full")
    made.add_argument("--again", action="store_true", help="with --full: from the beginning")
    made.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="at the same time"
    )
    made.add_argument("--list", action="store_true", help="run nothing")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def _completed(
    tasks: dict[str, Callable[[], dict[str, Any] | None]], args: argparse.Namespace
) -> Iterator[str]:
    """Run all tasks and yield the name of each once it is stored."""
    with (
        workers(args.jobs) as pool,
        tqdm(total=len(tasks), unit="comparison", disable=args.quiet) as bar,
    ):
        waiting = {pool.submit(task): name for name, task in tasks.items()}
        for done in as_completed(waiting):
            name, row = waiting[done], done.result()
            if row is not None:  # what a comparison found it has stored itself
                plan_sweep.keep(row, plan_sweep.SAVED, "--save --again")
            bar.set_postfix_str(name)
            bar.update()
            yield name


def again(item: Stored) -> None:
    """Simulate one comparison with its own arguments and replace its file."""
    args = arguments_of(item)
    began = time.perf_counter()
    setting = simulate.setting_of(args)
    outcomes = run(setting, quiet=True)
    content = document(setting, outcomes)
    content["wall_s"] = round(time.perf_counter() - began, 1)
    part = item.path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(item.path)


def arguments_of(item: Stored) -> argparse.Namespace:
    """The stored command line, with defaults for flags that are newer."""
    args = simulate.parser().parse_args([])
    for name, value in item.arguments.items():
        setattr(args, name, value)
    args.systems = [*args.systems, *(name for name in ALWAYS if name not in args.systems)]
    return args


def _documents() -> None:
    """Write everything that is made of stored results, measured ones included."""
    from benchmarks import validate_cluster

    results.main()
    validate_simulator.main()
    if list(validate_cluster.RESULTS.glob("calibrated-*.yaml")):
        validate_cluster.main([])
    if plan_sweep.SAVED.is_file():
        plan_sweep.write_document()


if __name__ == "__main__":
    sys.exit(main())
