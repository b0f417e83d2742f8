"""Figures of the source tree: folders, import closures, contracts, lengths, import circles, flags.

    python tools/house.py [--check] [--json FILE] [--root DIR] [--module NAME]...

The tree is parsed, not imported, so that any checkout can be measured; `--module` names what an
older one calls otherwise. `--check` exits with status 1 after one line per broken limit.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.source_graph import PACKAGE, Module, SourceGraph, circles, folder_circles, imports_upward

TRANSPORTS = tuple(
    f"{PACKAGE}.attention.transports.{name}" for name in ("gather", "ring", "pass_q", "ulysses")
)
CLOSURE_LIMITS = {f"{PACKAGE}.engine.engine": 120, TRANSPORTS[0]: 12}
MEASURED_CLOSURES = (
    f"{PACKAGE}.engine.engine",
    f"{PACKAGE}.worker.executor",
    f"{PACKAGE}.scheduler.scheduler",
    *TRANSPORTS,
)
LIMITS = {
    "modules in a folder": 24,
    "contracts of attend": 2,
    "lines of a function": 80,
    "columns of a line": 100,
    "flags in docs/cli.md": 55,
}
MAX_FILE_LINES = 300
_CONTRACT = "attend"
_OTHER_CONTRACTS = 8


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameter_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    """Names of the parameters in order, without `self`; two equal tuples are one contract."""
    arguments = function.args
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    stars = [star for star in (arguments.vararg, arguments.kwarg) if star is not None]
    return tuple(a.arg for a in [*listed, *stars] if a.arg not in ("self", "cls"))


def contracts(modules: Iterable[Module]) -> dict[str, dict[str, int]]:
    """Definitions and distinct parameter lists of `attend` and of the commonest other names."""
    found: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for module in modules:
        for function in functions(module):
            if not function.name.startswith("_"):
                found[function.name].append(parameter_names(function))
    common = sorted(found, key=lambda name: (-len(found[name]), name))
    chosen = [_CONTRACT, *[n for n in common if n != _CONTRACT][:_OTHER_CONTRACTS]]
    return {
        name: {"definitions": len(found[name]), "contracts": len(set(found[name]))}
        for name in chosen
    }


def measure(graph: SourceGraph, measured: Iterable[str]) -> dict[str, Any]:
    """All figures, as they are written to JSON."""
    filled = [module for module in graph.modules.values() if not module.is_empty_init]
    relative = {module.name: str(module.path.relative_to(graph.root)) for module in filled}
    lengths = {
        f"{relative[module.name]}:{function.lineno} {function.name}": function.end_lineno
        - function.lineno
        + 1
        for module in filled
        for function in functions(module)
        if function.end_lineno is not None
    }
    cli = graph.root / "docs" / "cli.md"
    flags = re.findall(r"^\| `(--[\w-]+)", cli.read_text() if cli.exists() else "", re.MULTILINE)
    by_length = sorted(lengths.items(), key=lambda item: (-item[1], item[0]))
    return {
        "folders": dict(sorted(Counter(graph.folder(m.name) for m in filled).items())),
        "closures": {
            name: len(graph.closure(name)) if name in graph.modules else None for name in measured
        },
        "contracts": contracts(m for m in filled if m.name.split(".")[0] == PACKAGE),
        "longest_functions": dict(by_length[:5]),
        "long_functions": dict(f for f in by_length if f[1] > LIMITS["lines of a function"]),
        "wide_lines": [
            f"{relative[module.name]}:{number}"
            for module in filled
            for number, line in enumerate(module.lines, 1)
            if len(line) > LIMITS["columns of a line"]
        ],
        "long_files": {
            relative[m.name]: len(m.lines) for m in filled if len(m.lines) > MAX_FILE_LINES
        },
        "imports_upward": imports_upward(graph),
        "module_circles": circles(graph.edges),
        "folder_circles": folder_circles(graph),
        "flags": len(set(flags)),
    }


def broken_limits(figures: Mapping[str, Any]) -> list[str]:
    """One line per figure beyond its limit."""

    def above(what: str, name: str, value: int) -> list[str]:
        return [f"{name}: {value}, limit {LIMITS[what]} ({what})"] if value > LIMITS[what] else []

    broken = []
    for folder, count in figures["folders"].items():
        broken += above("modules in a folder", folder, count)
    for name, size in figures["closures"].items():
        limit = CLOSURE_LIMITS.get(name)
        if size is None:
            broken.append(f"{name}: no such module, give the ones to measure by --module")
        elif limit is not None and size > limit:
            broken.append(f"{name}: imports {size} of our modules with itself, limit {limit}")
    attend = figures["contracts"][_CONTRACT]["contracts"]
    broken += above("contracts of attend", _CONTRACT, attend)
    for name, size in figures["long_functions"].items():
        broken += above("lines of a function", name, size)
    columns = LIMITS["columns of a line"]
    broken += [f"{place}: more than {columns} columns" for place in figures["wide_lines"]]
    broken += [f"{edge}: import upward" for edge in figures["imports_upward"]]
    broken += [f"circle: {' '.join(circle)}" for circle in figures["module_circles"]]
    broken += [f"circle of folders: {' '.join(c)}" for c in figures["folder_circles"]]
    return broken + above("flags in docs/cli.md", "docs/cli.md", figures["flags"])


def table(figures: Mapping[str, Any]) -> str:
    """The figures as one Markdown table, fullest folders and longest functions first."""
    folders = sorted(figures["folders"].items(), key=lambda item: (-item[1], item[0]))
    rows = [("modules in all folders", sum(figures["folders"].values()))]
    rows += [(f"modules in `{folder}`", count) for folder, count in folders[:8]]
    rows += [(f"import closure of `{name}`", size) for name, size in figures["closures"].items()]
    rows += [
        (
            f"definitions of `{name}` and their parameter lists",
            f"{f['definitions']}, {f['contracts']}",
        )
        for name, f in figures["contracts"].items()
    ]
    rows += [(f"lines of `{name}`", n) for name, n in figures["longest_functions"].items()]
    rows += [(f"lines of `{name}`", n) for name, n in figures["long_files"].items()]
    rows += [
        (f"lines above {LIMITS['columns of a line']} columns", len(figures["wide_lines"])),
        ("imports upward", len(figures["imports_upward"])),
        ("circles of modules", len(figures["module_circles"])),
        ("circles of folders", len(figures["folder_circles"])),
        ("flags in docs/cli.md", figures["flags"]),
    ]
    lines = ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument(
        "--module", action="append", help="measure import closures of these instead; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--check", action="store_true", help="fail on broken limits")
    arguments = parser.parse_args()
    figures = measure(SourceGraph.read(arguments.root), arguments.module or MEASURED_CLOSURES)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not arguments.check:
        print(table(figures))
        return 0
    broken = broken_limits(figures)
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
