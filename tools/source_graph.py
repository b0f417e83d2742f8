"""Modules of a checkout, what each imports at run time, and circles among them.

Sources are parsed, never imported. An import counts wherever it stands in a file, except under
`if TYPE_CHECKING`. Modules named by an import statement count; packages that run on the way to them
do not, and neither does an `__init__.py` without statements.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "sps2_mega"
TREES = (PACKAGE, "benchmarks", "launch", "tools", "tests")
# Other trees that a tree may import.
MAY_IMPORT = {
    PACKAGE: {PACKAGE},
    "launch": {PACKAGE},
    "tools": {PACKAGE},
    "benchmarks": {PACKAGE, "tools"},
    "tests": set(TREES),
}
_TYPES_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@dataclass(frozen=True)
class Module:
    """One source file; `imports` are dotted names as written, at any depth of the file."""

    name: str
    path: Path
    lines: list[str]
    tree: ast.Module
    imports: frozenset[str]

    @property
    def is_empty_init(self) -> bool:
        statements = self.tree.body[1:] if ast.get_docstring(self.tree) else self.tree.body
        return self.path.name == "__init__.py" and not statements


@dataclass
class SourceGraph:
    """A checkout: its modules by dotted name, and which of them each imports at run time."""

    root: Path
    modules: dict[str, Module] = field(default_factory=dict)
    edges: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> SourceGraph:
        graph = cls(root)
        for tree in TREES:
            for path in sorted((root / tree).rglob("*.py")):
                module = read_module(path, root)
                graph.modules[module.name] = module
        for name, module in graph.modules.items():
            graph.edges[name] = set(graph._named(module.imports)) - {name}
        return graph

    def _named(self, imports: Iterable[str]) -> Iterator[str]:
        """Modules that import statements name; packages run on the way to them do not count."""
        for imported in imports:
            for name in (imported, imported.rpartition(".")[0]):
                module = self.modules.get(name)
                if module is not None:
                    if not module.is_empty_init:
                        yield name
                    break

    def closure(self, name: str) -> set[str]:
        """The module and everything of the package that it imports, directly or not."""
        ours = {n: others for n, others in self.edges.items() if n.split(".")[0] == PACKAGE}
        return {name} | {n for n in _reached(ours, name) if n.split(".")[0] == PACKAGE}

    def folder(self, name: str) -> str:
        return str(self.modules[name].path.parent.relative_to(self.root))


def read_module(path: Path, root: Path) -> Module:
    text = path.read_text()
    tree = ast.parse(text, str(path))
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, path, text.splitlines(), tree, frozenset(_imports(tree)))


def _imports(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in _TYPES_ONLY:
            for branch in child.orelse:
                yield from _imports(branch)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from _imports(child)


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of two and more nodes that all reach each other."""
    left = {name: set(others) for name, others in edges.items()}
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends:
            del left[name]
    reached = {name: _reached(left, name) for name in left}
    found = {
        tuple(sorted(other for other in reached[name] if name in reached.get(other, ())))
        for name in left
    }
    return [list(circle) for circle in sorted(found) if len(circle) > 1]


def _reached(edges: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = edges.get(ahead.pop(), set()) - found
        found |= new
        ahead += new
    return found


def layer_of(root: Path) -> dict[str, tuple[int, str]]:
    """Height and sibling of each prefix in the layers contract of pyproject.toml, 0 on top."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "layers":
            return {
                sibling.strip(" ()"): (height, sibling.strip(" ()") if "|" in layer else "")
                for height, layer in enumerate(contract["layers"])
                for sibling in re.split(r"[|:]", layer)
            }
    return {}


def imports_upward(graph: SourceGraph) -> list[str]:
    """Imports against the layers contract, or from a tree into one that stands above it."""
    layers = layer_of(graph.root)

    def layer(name: str) -> tuple[int, str] | None:
        inside = [prefix for prefix in layers if f"{name}.".startswith(f"{prefix}.")]
        return layers[max(inside, key=len)] if inside else None

    upward = []
    for name, imported in ((n, i) for n, all_of in graph.edges.items() for i in sorted(all_of)):
        trees = name.split(".")[0], imported.split(".")[0]
        low, high = layer(name), layer(imported)
        wrong = trees[1] not in {trees[0], *MAY_IMPORT[trees[0]]}
        if low is not None and high is not None:
            wrong |= high[0] < low[0] or (high[0] == low[0] and high[1] != low[1])
        if wrong:
            upward.append(f"{name} -> {imported}")
    return upward


def folder_circles(graph: SourceGraph) -> list[list[str]]:
    """Circles between folders and modules that lie side by side in one folder."""
    beside: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, imported in graph.edges.items():
        for other in imported:
            here, there = name.split("."), other.split(".")
            shared = 0
            while shared < min(len(here), len(there)) and here[shared] == there[shared]:
                shared += 1
            parent = ".".join(here[:shared])
            if shared < min(len(here), len(there)):
                beside[parent][_child(here, shared)].add(_child(there, shared))
    found = [circle for edges in beside.values() for circle in circles(edges)]
    return sorted(
        circle
        for circle in found
        if any((graph.root / name.replace(".", "/")).is_dir() for name in circle)
    )


def _child(parts: list[str], depth: int) -> str:
    return ".".join(parts[: depth + 1])
