"""Origin of a benchmark result: machine, versions, command, date."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_STEAL = 7  # in a line of /proc/stat


def describe() -> dict[str, Any]:
    """Hardware and versions, for the head of a result file."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "megatron-core", "transformers")},
    }


def interleaved(
    contestants: dict[str, Callable[[], dict[str, float]]], repeats: int
) -> dict[str, dict[str, float]]:
    """Run the contestants in turn and return the medians of what each returned.

    There are `repeats` rounds after one warm-up. Taking turns spreads the noise of a shared machine
    over all of them.
    """
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for round_number in range(repeats + 1):
        for name, run in contestants.items():
            sample = run()
            if round_number:
                samples[name].append(sample)
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in samples.items()
    }


def stolen_since() -> Callable[[], float]:
    """Start counting stolen time; the returned function gives its share of the cores' time since.

    Stolen is what a virtual machine's host gave to others while this one had work, as Linux counts
    it.
    """

    def counted() -> list[int]:
        return [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]

    before = counted()

    def share() -> float:
        spent = [now - then for now, then in zip(counted(), before, strict=True)]
        return spent[_STEAL] / max(1, sum(spent))

    return share


def save(name: str, result: dict[str, Any], arguments: list[str] | None = None) -> Path:
    """Write docs/results/NAME.json with the command line and the machine.

    `arguments` replace those of the command line, which may name folders of this machine.
    """
    path = ROOT / "docs" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    given = sys.argv[1:] if arguments is None else arguments
    command = f"python {script} {shlex.join(given)}".strip()
    head = {"command": command, "date": datetime.now(UTC).date().isoformat(), "machine": describe()}
    path.write_text(json.dumps(head | result, indent=2) + "\n")
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
