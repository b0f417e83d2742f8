"""Habits that a machine can check: homes of imports, sizes, forbidden things, frozen flags.

Layers between our own modules are import-linter's (pyproject.toml); formatting and lint are ruff's.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sps2_mega"
MAX_LINES = 300
MAX_FILE_BYTES = 8 * 2**20

# Library -> the only files (globs below the root) that may import it, at any depth of the file.
HOMES = {
    "megatron": ["sps2_mega/mcore/*", "tests/*", "tools/*", "benchmarks/*"],
    "triton": ["sps2_mega/kernels/*/triton.py", "tests/*", "tools/*", "benchmarks/*"],
    "deepspeed": ["sps2_mega/mcore/init.py", "launch/*", "tests/*"],
    "transformers": [
        "sps2_mega/text/tokenizer_conversion.py",
        "tests/*",
        "tools/*",
        "benchmarks/*",
    ],
    "safetensors": ["sps2_mega/checkpoint/*", "tests/*", "tools/*", "benchmarks/*"],
    "tokenizers": ["sps2_mega/text/*", "tests/*", "tools/*", "benchmarks/*"],
    "pydantic": [
        "sps2_mega/serving/*",
        "sps2_mega/text/*",
        "sps2_mega/checkpoint/huggingface/*",
        "tests/*",
    ],
    "fastapi": ["sps2_mega/serving/*", "tests/*"],
    "uvicorn": ["sps2_mega/serving/*", "tests/*"],
    "prometheus_client": ["sps2_mega/serving/*", "tests/*"],
    "torch.distributed": [
        "sps2_mega/cli/doctor.py",  # looks for backends
        "sps2_mega/comm/*",
        "sps2_mega/engine/startup/rank_checks.py",  # asks whether a program has a group already
        # torch.distributed.checkpoint, a file format
        "sps2_mega/checkpoint/megatron/torch_dist_writer.py",
        "sps2_mega/parallel/groups.py",
        "sps2_mega/mcore/*",
        "tests/*",
        "tools/*",
        "benchmarks/*",
    ],
}
ENVIRONMENT_READERS = {"sps2_mega/parallel/launcher.py"}
PRINTERS = ("sps2_mega/cli/", "launch/", "tools/", "benchmarks/", "tests/")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
LIGHT_MODULES = [
    "sps2_mega",
    "sps2_mega.types",
    "sps2_mega.config",
    "sps2_mega.kv_cache.ledger",
    "sps2_mega.scheduler.scheduler",
    "sps2_mega.worker.sampling.seeds",
]
HEAVY_LIBRARIES = ["torch", "numpy", "megatron", "transformers", "deepspeed", "triton", "pydantic"]


@cache
def tracked_files() -> tuple[str, ...]:
    """Files of the repository, as git sees them; all files below the root where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        names = listing.stdout.split("\0")
    else:
        names = [
            str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts
        ]
    return tuple(sorted(name for name in names if name and (ROOT / name).is_file()))


def python_files(*folders: str) -> list[str]:
    names = [name for name in tracked_files() if name.endswith(".py")]
    return [name for name in names if not folders or name.startswith(folders)]


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), name)


def imports_of(name: str) -> Iterator[str]:
    """Dotted names of all that a file imports, in functions too, or reaches as `torch.distributed`.

    What only type checkers see does not count.
    """
    for node in nodes_at_run_time(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def nodes_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from nodes_at_run_time(child)


def belongs_to(imported: str, library: str) -> bool:
    return imported == library or imported.startswith(library + ".")


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_are_imported_only_in_their_homes(library):
    strangers = [
        name
        for name in python_files()
        if any(belongs_to(imported, library) for imported in imports_of(name))
        and not any(Path(name).match(home) or name.startswith(home[:-1]) for home in HOMES[library])
    ]
    assert not strangers, f"{library} may be imported in {HOMES[library]} only"


def test_importing_the_pure_modules_loads_no_library_and_prints_nothing():
    code = (
        f"import sys, {', '.join(LIGHT_MODULES)}\n"
        f"heavy = [name for name in {HEAVY_LIBRARIES} if name in sys.modules]\n"
        "sys.exit('loaded: ' + ', '.join(heavy) if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_environment_variables_are_read_in_one_place():
    readers = [
        name
        for name in python_files("sps2_mega/")
        if name not in ENVIRONMENT_READERS
        and any(
            (isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"))
            or (
                isinstance(node, ast.ImportFrom)
                and {a.name for a in node.names} & {"environ", "getenv"}
            )
            for node in ast.walk(tree_of(name))
        )
    ]
    assert not readers, f"read the environment in {ENVIRONMENT_READERS} and pass values on"


def test_only_edges_print():
    printers = [
        name
        for name in python_files()
        if not name.startswith(PRINTERS)
        and any(
            isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            for node in ast.walk(tree_of(name))
        )
    ]
    assert not printers, "use logging"


def test_no_bare_except_and_no_global_statement():
    wrong = [
        f"{name}:{node.lineno}"
        for name in python_files()
        for node in ast.walk(tree_of(name))
        if (isinstance(node, ast.ExceptHandler) and node.type is None)
        or isinstance(node, ast.Global)
    ]
    assert not wrong


def test_files_stay_small():
    sizes = {
        name: len((ROOT / name).read_text().splitlines()) for name in python_files("sps2_mega/")
    }
    long = {name: size for name, size in sizes.items() if size > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines: split by concept"


def test_file_names_say_what_is_inside():
    assert not [name for name in python_files() if Path(name).stem in VAGUE_NAMES]


def test_every_module_says_what_it_decides():
    silent = [
        name
        for name in python_files("sps2_mega/", "tools/", "benchmarks/", "launch/")
        if tree_of(name).body and ast.get_docstring(tree_of(name)) is None
    ]
    assert not silent, "a module docstring is missing"


def test_nothing_is_left_to_do_and_no_machine_path_is_written():
    left = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(?#\d)")
    machine = re.compile(
        "|".join("/" + path for path in ("work/", "tmp/w/", "root/", "home/[a-z]"))
    )
    text_suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".jsonl", ".sh", ""}
    skipped = ("tests/test_style.py", "LICENSE")
    found = []
    for name in tracked_files():
        path = Path(name)
        # An index of torch.distributed.checkpoint is binary, and has no suffix.
        if path.suffix not in text_suffixes or path.name == ".metadata" or name in skipped:
            continue
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            if left.search(line) or machine.search(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not found


def test_no_large_file_slips_in():
    sizes = {name: (ROOT / name).stat().st_size for name in tracked_files()}
    assert not {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES}


def test_every_triton_kernel_has_a_reference_with_the_same_functions():
    def functions(name: str) -> dict[str, str]:
        return {
            node.name: ast.unparse(node.args)
            for node in tree_of(name).body
            if isinstance(node, ast.FunctionDef)
            and not node.name.startswith("_")
            and not node.decorator_list
        }

    for name in python_files("sps2_mega/kernels/"):
        if Path(name).name != "triton.py":
            continue
        reference = functions(str(Path(name).with_name("reference.py")))
        fast = functions(name)
        assert fast.items() <= reference.items(), f"{name} differs from its reference.py"


def test_command_line_flags_are_the_frozen_ones():
    """A new flag edits this list, so that it shows in review."""
    from sps2_mega.cli.flags import flags_of
    from sps2_mega.config import EngineConfig

    assert flags_of(EngineConfig).keys() == FROZEN_FLAGS


FROZEN_FLAGS = {
    "config",
    "csa-degrees",
    "cuda-graphs",
    "decode-attention",
    "decode-ranks",
    "device",
    "dtype",
    "gpu-memory-utilization",
    "load-format",
    "max-model-len",
    "max-num-batched-tokens",
    "max-num-queued-reqs",
    "max-num-seqs",
    "model",
    "no-enable-prefix-caching",
    "num-gpu-blocks-override",
    "pipeline",
    "scheduler",
    "seed",
    "sp",
    "sp-levels",
    "sp-threshold",
    "tbt-target-ms",
    "threads",
    "tokenizer",
    "tp",
    "trace",
    "transport",
}


def test_the_structure_document_is_current():
    from tools import structure

    written = (ROOT / "docs" / "structure.md").read_text()
    assert written == structure.markdown(), "run: python tools/structure.py > docs/structure.md"
