"""Loading of a `torch_dist` folder at another TP x PP than it was written at, beside a copy of it.

    python benchmarks/load_checkpoint.py --folder DIR [--before CHECKOUT] --save

Writes a folder as a run at --written TP PP does (one file per rank, random weights; kept if it is
there), and then, in turn, each time with the files out of the page cache:

    copy     the files that one TP rank needs, to DIR, by `shutil.copyfile`
    read     the same files, to nowhere: what the disk gives at most
    after    one TP rank's weights into its parameters, by this checkout
    before   the same by another checkout

Rates are bytes of those files per second. Peak memory is that of the process above what it had
before its parameters were made. A rank needs whole files here, as a TP that is half of the
writer's does; parts of files that it does not need count as read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.generation.checkout import commit_of
from benchmarks.loading.folder import RunWriter
from sps2_mega.checkpoint.megatron.metadata import read_metadata
from sps2_mega.checkpoint.megatron.names import canonical_name
from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.checkpoint.sharding import rank_part
from sps2_mega.config import ModelConfig

CHILD = Path(__file__).resolve().parent / "loading" / "child.py"
_LIMIT_S = 1800
_STEP = 16 << 20


def needed_files(folder: Path, config: ModelConfig, rank: int, tp: int) -> list[Path]:
    """Files with a piece that overlaps the rank's part of any tensor."""
    needed: set[Path] = set()
    for stored in read_metadata(folder).tensors:
        name = str(canonical_name(stored.name))
        stacked = name.startswith("decoder.layers.")
        name = name.replace("decoder.layers.", "decoder.layers.0.") if stacked else name
        part = rank_part(name, config, tp_rank=rank, tp=tp)
        for piece in stored.pieces:
            dim = 0 if part is None else part.dim + stacked
            start, stop = piece.offsets[dim], piece.offsets[dim] + piece.sizes[dim]
            if part is None or any(r.start < stop and start < r.stop for r in part.ranges):
                needed.add(piece.place.file)
    return sorted(needed)


def forget(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy(files: list[Path], target: Path) -> dict[str, float]:
    target.mkdir()
    began = time.perf_counter()
    for path in files:
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return {"seconds": seconds}


def read(files: list[Path]) -> dict[str, float]:
    buffer = bytearray(_STEP)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - began}


def load(checkout: Path, folder: Path, model: str, rank: int, tp: int) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(CHILD), str(folder), model, str(rank), str(tp)],
        capture_output=True,
        text=True,
        cwd=checkout,
        env=environment,
        timeout=_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="place of folder and copies")
    parser.add_argument("--model", default="llama-3-8b", help="name in model_configs/")
    parser.add_argument("--written", type=int, nargs=2, default=(4, 2), metavar=("TP", "PP"))
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write docs/results/loading.json")
    arguments = parser.parse_args()
    config = named_model_file(arguments.model).config
    written_tp, written_pp = arguments.written
    folder = arguments.folder / f"{arguments.model}-tp{written_tp}-pp{written_pp}"
    if not (folder / "metadata.json").is_file():
        RunWriter(folder, config, written_tp, written_pp).write()
    files = needed_files(folder, config, arguments.rank, arguments.tp)
    size = sum(path.stat().st_size for path in files)
    job = (folder, arguments.model, arguments.rank, arguments.tp)
    runs: dict[str, Any] = {
        "copy": lambda: copy(files, arguments.folder / "copy"),
        "read": lambda: read(files),
        "after": lambda: load(machine.ROOT, *job),
    }
    if arguments.before is not None:
        runs["before"] = lambda: load(arguments.before.resolve(), *job)
    stolen = machine.stolen_since()
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats):
        order = list(runs) if repeat % 2 == 0 else list(runs)[::-1]
        for name in order:
            forget(files)
            sample = runs[name]()
            samples[name].append(sample)
            print(f"{repeat + 1}  {name:7}{size / sample['seconds'] / 1e6:8.0f} MB/s", flush=True)
    result = summary(samples, size) | {
        "model": arguments.model,
        "written": {"tp": written_tp, "pp": written_pp},
        "loaded": {"tp": arguments.tp, "rank": arguments.rank},
        "folder_bytes": sum(path.stat().st_size for path in folder.glob("*.distcp")),
        "needed_bytes": size,
        "share_stolen": stolen(),
    }
    if arguments.before is not None:
        result["commits"] = {
            "after": commit_of(machine.ROOT),
            "before": commit_of(arguments.before.resolve()),
        }
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=2))
    if arguments.save:
        print("written:", machine.save("loading", result, _without_folders(sys.argv[1:])))
    return 0


def summary(samples: dict[str, list[dict[str, float]]], size: int) -> dict[str, Any]:
    """Medians, rates and ratios to the copy; loads of all checkouts must agree in every bit.

    Raises:
        SystemExit: they do not.
    """
    sums = {s["sum"] for runs in samples.values() for s in runs if "sum" in s}
    if len(sums) > 1:
        raise SystemExit(f"the checkouts load different weights: {sums}")
    found: dict[str, Any] = {}
    for name, runs in samples.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        found[name] = {"seconds": seconds, "mb_per_s": size / seconds / 1e6}
        if "peak_bytes" in runs[0]:
            above = max(run["peak_bytes"] - run["bytes"] for run in runs)
            found[name] |= {"slice_bytes": runs[0]["bytes"], "peak_above_slice_bytes": above}
            for other in ("copy", "read"):
                ratios = [
                    mate["seconds"] / run["seconds"]
                    for run, mate in zip(runs, samples[other], strict=True)
                ]
                found[name][f"rate_over_{other}"] = statistics.median(ratios)
    return found | {"samples": samples}


def _without_folders(arguments: list[str]) -> list[str]:
    shown: list[str] = []
    for argument in arguments:
        known = shown and shown[-1] in ("--before", "--folder")
        shown.append(shown[-1][2:].upper() if known else argument)
    return shown


if __name__ == "__main__":
    sys.exit(main())
