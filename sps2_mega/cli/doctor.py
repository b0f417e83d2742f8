"""`sps2 doctor`: what this machine has, what will be used of it, and what is missing.

    sps2 doctor [--json] [--tokenizer DIR]

Runs without any dependency installed. Looks at packages through their metadata and files and
imports none but torch and `packaging`, so that a broken or mistaken package cannot run here. Exit
code 1 when something required is missing or outside the range that pyproject.toml allows.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHECKOUT = Path(__file__).resolve().parents[2]
Status = Literal["ok", "absent", "wrong"]
MARKS: dict[Status, str] = {"ok": "ok", "absent": "--", "wrong": "!!"}

# Files that only NVIDIA's apex has; the `apex` of the Python package index is a web login toolkit.
NVIDIA_APEX_FILES = ("normalization/fused_layer_norm.py", "multi_tensor_apply/__init__.py")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; a `required` finding that is not ok makes the machine unfit."""

    name: str
    status: Status
    detail: str
    required: bool = False


def main(argv: Sequence[str] | None = None, *, prog: str = "sps2 doctor") -> int:
    """Print the report; exit code 1 when the machine is unfit."""
    parser = argparse.ArgumentParser(
        prog=prog, description="What this machine has and what will be used."
    )
    parser.add_argument("--json", action="store_true", help="machine-readable report")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="also read this folder's tokenizer and compare it with transformers' AutoTokenizer",
    )
    args = parser.parse_args(argv)
    findings = examine()
    if args.tokenizer is not None:
        findings += tokenizer(args.tokenizer)
    plan = what_will_be_used(findings)
    missing = [f.name for f in findings if f.required and f.status != "ok"]
    if args.json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"ok": not missing, "findings": rows, "used": plan}, indent=2))
    else:
        print(as_text(findings, plan, missing))
    return 1 if missing else 0


def examine() -> list[Finding]:
    """All findings, in the order of the report."""
    findings = [python_version(), *machine()]
    findings += [required_package(each) for each in requirements() if needed_here(each)]
    findings += torch_facts()
    findings += [triton(), apex(), transformer_engine()]
    findings += [program("deepspeed", "launcher"), program("torchrun", "launcher")]
    findings.append(program("ip", "network namespaces in tests; package iproute2"))
    return findings


def python_version() -> Finding:
    ok = sys.version_info >= (3, 11)
    detail = platform.python_version() + ("" if ok else " (needed: >= 3.11)")
    return Finding("python", "ok" if ok else "wrong", detail, required=True)


def machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    total, available = memory_gib(Path("/proc/meminfo").read_text())
    return [
        Finding("cores", "ok", f"{cores} usable"),
        Finding("memory", "ok", f"{available:.1f} GiB available of {total:.1f} GiB"),
    ]


def memory_gib(meminfo: str) -> tuple[float, float]:
    """(total, available) in GiB from the text of /proc/meminfo, which counts in KiB."""
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.M)}
    return kib["MemTotal"] / 2**20, kib["MemAvailable"] / 2**20


def requirements() -> list[str]:
    """Dependencies, as "torch>=2.11,<2.14": of the checkout, else of the installed package."""
    file = CHECKOUT / "pyproject.toml"
    if file.is_file():
        return list(tomllib.loads(file.read_text())["project"]["dependencies"])
    try:
        declared = importlib.metadata.requires("sps2_mega") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [each for each in declared if "extra ==" not in each]


def needed_here(requirement: str) -> bool:
    """Whether the condition after a requirement's semicolon, if any, holds on this machine.

    Python's standard library cannot tell; without `packaging` such a requirement is not looked at.
    """
    _, _, condition = requirement.partition(";")
    if not condition:
        return True
    try:
        from packaging.markers import Marker
    except ImportError:
        return False
    return bool(Marker(condition.strip()).evaluate())


def required_package(requirement: str) -> Finding:
    name, needed = split_requirement(requirement)
    version = installed_version(name)
    if version is None:
        return Finding(name, "absent", f"not installed (needed: {needed})", required=True)
    if not within(version, needed):
        return Finding(name, "wrong", f"{version} (needed: {needed})", required=True)
    return Finding(name, "ok", version, required=True)


def split_requirement(requirement: str) -> tuple[str, str]:
    stated = requirement.partition(";")[0].strip()
    name = re.split(r"[<>=!~\[ ]", stated, maxsplit=1)[0]
    return name, stated[len(name) :]


def within(version: str, needed: str) -> bool:
    """True if a version meets bounds like ">=2.11,<2.14"; compares release numbers only."""
    for bound in filter(None, needed.split(",")):
        match = re.fullmatch(r"(>=|<|==)\s*([\d.]+)", bound.strip())
        assert match, f"a bound of pyproject.toml is not understood: {bound!r}"
        operator, limit = match.groups()
        ours, theirs = release(version), release(limit)
        width = max(len(ours), len(theirs))
        ours, theirs = pad(ours, width), pad(theirs, width)
        if not {">=": ours >= theirs, "<": ours < theirs, "==": ours == theirs}[operator]:
            return False
    return True


def release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


def pad(numbers: tuple[int, ...], width: int) -> tuple[int, ...]:
    return numbers + (0,) * (width - len(numbers))


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_facts() -> list[Finding]:
    """CUDA devices and communication backends, as torch itself sees them."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        return [Finding("torch works", "wrong", f"cannot be imported: {error}", required=True)]
    findings = [Finding("torch works", "ok", f"build {torch.__version__}", required=True)]
    if torch.cuda.is_available():
        findings += [
            Finding(f"cuda:{i}", "ok", cuda_device(i)) for i in range(torch.cuda.device_count())
        ]
    else:
        why = "build without CUDA" if torch.version.cuda is None else "no device is visible"
        findings.append(Finding("cuda", "absent", why))
    nccl = dist.is_available() and dist.is_nccl_available()
    version = (
        ".".join(map(str, torch.cuda.nccl.version())) if nccl else "not in this build of torch"
    )
    findings.append(Finding("nccl", "ok" if nccl else "absent", version))
    gloo = dist.is_available() and dist.is_gloo_available()
    detail = "in torch" if gloo else "not in this build of torch"
    findings.append(Finding("gloo", "ok" if gloo else "absent", detail, required=True))
    return findings


def cuda_device(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    gib = properties.total_memory / 2**30
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {gib:.0f} GiB, compute capability {capability}"


def triton() -> Finding:
    version = installed_version("triton")
    return Finding(
        "triton", "ok" if version else "absent", version or "not installed (comes with CUDA torch)"
    )


def apex() -> Finding:
    """NVIDIA's apex, or the unrelated package of that name, told apart by their files."""
    folder = package_folder("apex")
    if folder is None:
        return Finding("apex", "absent", "not installed (optional: NVIDIA's, built from source)")
    if all((folder / name).is_file() for name in NVIDIA_APEX_FILES):
        kernels = importlib.util.find_spec("fused_layer_norm_cuda") is not None
        return Finding(
            "apex",
            "ok",
            "NVIDIA's, " + ("with" if kernels else "without") + " fused layer norm kernels",
        )
    return Finding(
        "apex",
        "wrong",
        f"{folder} is not NVIDIA's apex but another project of that name; Megatron would import "
        "it: pip uninstall apex",
    )


def package_folder(name: str) -> Path | None:
    """Folder of a top-level package, found without running any of its code."""
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def transformer_engine() -> Finding:
    if package_folder("transformer_engine") is None:
        return Finding("transformer-engine", "absent", "not installed (optional)")
    return Finding(
        "transformer-engine", "ok", installed_version("transformer_engine") or "unknown version"
    )


def tokenizer(folder: Path) -> list[Finding]:
    """Whether a folder's tokenizer can be read, and whether AutoTokenizer would agree with it."""
    from sps2_mega.cli.tokenizer_report import tokenizer_facts, tokenizer_line
    from sps2_mega.errors import ConfigError

    try:
        facts = tokenizer_facts(folder)
    except ConfigError as error:
        return [Finding("tokenizer", "wrong", str(error), required=True)]
    differs = facts["differs"]
    return [
        Finding("tokenizer", "ok", tokenizer_line(facts), required=True),
        Finding("AutoTokenizer", "wrong" if differs else "ok", differs or "makes the same ids"),
    ]


def program(name: str, purpose: str) -> Finding:
    """A program beside this interpreter or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    found = shutil.which(name, path=path)
    return Finding(f"`{name}`", "ok" if found else "absent", found or f"not found ({purpose})")


def what_will_be_used(findings: list[Finding]) -> dict[str, str]:
    """Choices that `--device auto` and the model code make on this machine."""
    status = {finding.name: finding.status for finding in findings}
    num_devices = sum(name.startswith("cuda:") for name in status)
    cuda = num_devices > 0
    nccl = cuda and status.get("nccl") == "ok"
    apex_norm = any(f.name == "apex" and "with fused" in f.detail for f in findings)
    return {
        "device": f"cuda ({num_devices})" if cuda else "cpu",
        "communication": "nccl" if nccl else "gloo",
        "dtype auto": "the checkpoint's" if cuda else "float32",
        "layer norm": "apex" if cuda and apex_norm else "torch",
        "RMS norm": "torch",
        "linear layers": "megatron-core (Transformer Engine is not used)",
    }


def as_text(findings: list[Finding], plan: dict[str, str], missing: list[str]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = [f"{MARKS[f.status]}  {f.name:<{width}}  {f.detail}" for f in findings]
    lines += ["", "will be used:"]
    lines += [f"    {name:<{width}}  {choice}" for name, choice in plan.items()]
    verdict = f"NOT fit: {', '.join(missing)}" if missing else "fit to run sps2_mega"
    return "\n".join([*lines, "", verdict])
