"""Figures of a made-up source tree, and the limits that `--check` applies to them."""

import json
import sys

import pytest

from tools import house
from tools.source_graph import SourceGraph, circles, folder_circles, imports_upward

PYPROJECT = """
[[tool.importlinter.contracts]]
type = "layers"
layers = ["(sps2_mega.cli)", "sps2_mega.engine", "sps2_mega.comm | sps2_mega.kernels"]
"""
FILES = {
    "sps2_mega/__init__.py": "import sps2_mega.cli\n",
    "sps2_mega/cli.py": "from sps2_mega.engine import engine\n",
    "sps2_mega/engine/__init__.py": '"""Nothing but words."""\n',
    "sps2_mega/engine/engine.py": (
        "from typing import TYPE_CHECKING\n"
        "from sps2_mega.comm.wire import send\n"
        "if TYPE_CHECKING:\n"
        "    from sps2_mega.engine.types import Request\n"
        "def run(self):\n"
        "    from sps2_mega.engine.late import work\n"
    ),
    "sps2_mega/engine/late.py": "class A:\n    def attend(self, q, k): ...\n",
    "sps2_mega/engine/types.py": "class B:\n    def attend(self, q: int, k: int): ...\n",
    "sps2_mega/comm/wire.py": "def send(*parts): ...\ndef attend(q): ...\n",
    "sps2_mega/kernels/op.py": "",
    "docs/cli.md": "| flag | meaning |\n|---|---|\n| `--tp N` | x |\n| `--sp N` | x |\n",
    "pyproject.toml": PYPROJECT,
}


def build(root, **more):
    for name, text in (FILES | more).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def figures(root, *modules):
    return house.measure(SourceGraph.read(root), modules or ("sps2_mega.engine.engine",))


def test_closure_takes_function_level_imports_but_no_types_and_no_packages(tmp_path):
    graph = SourceGraph.read(build(tmp_path))
    assert graph.closure("sps2_mega.engine.engine") == {
        "sps2_mega.engine.engine",
        "sps2_mega.engine.late",
        "sps2_mega.comm.wire",
    }


def test_figures_of_a_clean_tree(tmp_path):
    found = figures(build(tmp_path))
    assert found["folders"]["sps2_mega/engine"] == 3  # its __init__ has no statement
    assert found["closures"] == {"sps2_mega.engine.engine": 3}
    assert found["contracts"]["attend"] == {"definitions": 3, "contracts": 2}
    assert found["flags"] == 2
    assert house.broken_limits(found) == []


def test_each_broken_limit_is_one_line(tmp_path):
    long = "def long():\n" + "    pass\n" * 80
    wide = f"x = '{'y' * 100}'\n"
    crowd = {f"sps2_mega/comm/m{i}.py": "" for i in range(24)}
    more = {"sps2_mega/kernels/op.py": long + wide + "def attend(): ...\n"} | crowd
    found = figures(build(tmp_path, **more), "sps2_mega.no_such")
    assert house.broken_limits(found) == [
        "sps2_mega/comm: 25, limit 24 (modules in a folder)",
        "sps2_mega.no_such: no such module, give the ones to measure by --module",
        "attend: 3, limit 2 (contracts of attend)",
        "sps2_mega/kernels/op.py:1 long: 81, limit 80 (lines of a function)",
        "sps2_mega/kernels/op.py:82: more than 100 columns",
    ]


@pytest.mark.parametrize(
    ("file", "imported"),
    [
        ("sps2_mega/comm/wire.py", "sps2_mega.engine.late"),  # a layer below the other
        ("sps2_mega/comm/wire.py", "sps2_mega.kernels.op"),  # beside it, independent
        ("sps2_mega/comm/wire.py", "tools.made"),  # out of the package
        ("tools/made.py", "benchmarks.made"),
    ],
)
def test_import_upward(tmp_path, file, imported):
    files = {"tools/made.py": "", "benchmarks/made.py": ""} | {file: f"import {imported}\n"}
    graph = SourceGraph.read(build(tmp_path, **files))
    importer = file.removesuffix(".py").replace("/", ".")
    assert imports_upward(graph) == [f"{importer} -> {imported}"]


def test_circles_of_modules_and_of_folders(tmp_path):
    more = {
        "sps2_mega/engine/a/one.py": "import sps2_mega.engine.b.one\n",
        "sps2_mega/engine/b/one.py": "import sps2_mega.engine.b.two\n",
        "sps2_mega/engine/b/two.py": "import sps2_mega.engine.a.two\n",
        "sps2_mega/engine/a/two.py": "",
    }
    graph = SourceGraph.read(build(tmp_path, **more))
    assert circles(graph.edges) == []
    assert folder_circles(graph) == [["sps2_mega.engine.a", "sps2_mega.engine.b"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_command_writes_json_and_fails_on_a_broken_limit(tmp_path, monkeypatch, capsys):
    build(tmp_path)
    written = tmp_path / "figures.json"
    command = ["house.py", "--root", str(tmp_path), "--module", "sps2_mega.engine.engine"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(written)])
    assert house.main() == 0
    assert "| flags in docs/cli.md | 2 |" in capsys.readouterr().out
    assert json.loads(written.read_text())["closures"] == {"sps2_mega.engine.engine": 3}
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert house.main() == 0
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "wide.py").write_text("#" + "x" * 100 + "\n")
    assert house.main() == 1
    assert capsys.readouterr().out == "tools/wide.py:1: more than 100 columns\n"
