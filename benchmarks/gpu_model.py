"""A whole model on one GPU: prefill, decode and host time against the card and transformers.

    python benchmarks/gpu_model.py [--budget-s 500] [--parts decode,prefill] [--out docs/results]
    python benchmarks/gpu_model.py --tiny      starts everything on a CPU; its numbers mean nothing

Random bf16 weights of Llama-3-8B shape are made on the device; nothing is downloaded. Each part
runs in a process of its own with a limit of its own, so that one that fails, hangs or leaves a
broken device behind takes nothing with it. OUT/gpu-model.json is rewritten after every part and
always holds all cases measured so far.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import machine
from benchmarks.gpu import figures
from benchmarks.gpu.budget import PARTS, limit_s

_END_S = 5.0  # between a part's own deadline and its end by force


def run_parts(parts: list[str], arguments: argparse.Namespace) -> int:
    """Run the parts one after the other; return how many did not end well."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu_model.py" + (" --tiny" if arguments.tiny else ""),
        "machine": machine.describe(),
        "parts": {},
        "rows": [],
    }
    if arguments.tiny:
        result["warning"] = "tiny sizes: shows that everything starts, the times mean nothing"
    ends = time.monotonic() + arguments.budget_s
    failed = 0
    for index, name in enumerate(parts):
        limit = limit_s(name, parts[index + 1 :], ends - time.monotonic())
        print(f"-- {name}, at most {limit:.0f} s", flush=True)
        began = time.monotonic()
        rows, status = _run_part(name, limit, arguments.tiny)
        result["rows"] += rows
        result["parts"][name] = {"status": status, "seconds": time.monotonic() - began}
        failed += status != "ended" or any("error" in row for row in rows)
        (out / "gpu-model.json").write_text(json.dumps(result, indent=1) + "\n")
    figures.plot(result["rows"], out / "gpu-model.png")
    print("\n".join(figures.lines(result["rows"])))
    print(json.dumps({name: part["status"] for name, part in result["parts"].items()}))
    return failed


def _run_part(name: str, limit: float, tiny: bool) -> tuple[list[dict[str, Any]], str]:
    """Cases that the part wrote, and how its process ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        command = [sys.executable, __file__, "--run-part", name, "--file", str(file)]
        command += ["--budget-s", str(max(1.0, limit - _END_S))] + ["--tiny"] * tiny
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
            status = "ended" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        written = file.read_text().splitlines() if file.is_file() else []
        return [json.loads(line) for line in written], status


def run_here(name: str, arguments: argparse.Namespace) -> None:
    """Run one part in this process."""
    deadline = time.monotonic() + arguments.budget_s
    import torch

    from benchmarks.gpu.part import Part
    from benchmarks.gpu.sizes import FULL, TINY

    torch.manual_seed(0)
    part = Part(
        name=name,
        sizes=TINY if arguments.tiny else FULL,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        deadline=deadline,
        file=Path(arguments.file),
    )
    importlib.import_module(f"benchmarks.gpu.{name}").run(part)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tiny", action="store_true", help="tiny sizes; works on a CPU")
    made.add_argument("--budget-s", type=float, default=500.0, help="seconds for all parts")
    made.add_argument("--parts", default=",".join(PARTS), help="some of them, in this order")
    made.add_argument("--out", default=str(machine.ROOT / "docs" / "results"))
    made.add_argument("--run-part", help=argparse.SUPPRESS)
    made.add_argument("--file", help=argparse.SUPPRESS)
    return made


def main() -> int:
    arguments = parser().parse_args()
    if arguments.run_part:
        run_here(arguments.run_part, arguments)
        return 0
    parts = arguments.parts.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        parser().error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    if not arguments.tiny:
        import torch

        if not torch.cuda.is_available():
            parser().error("torch sees no CUDA device: only --tiny runs without one")
    return min(1, run_parts(parts, arguments))


if __name__ == "__main__":
    sys.exit(main())
