"""Runs of launch/generate.py on the bundled model, in tests: input, command line, answers by id."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from launched import ROOT

SNIPPETS = (
    "def add(a, b):\n    return ",
    "import os\nimport sys\n\n\nclass Queue:\n    def __init__(self, size):\n",
    "x",
    "for index, item in enumerate(items):\n    if item is None:\n        continue\n" * 9,
)


def write_requests(path: Path, num_requests: int, max_tokens: int) -> list[str]:
    """Greedy requests of mixed lengths that run their full length; returns their ids."""
    ids = [f"request-{i}" for i in range(num_requests)]
    with path.open("w") as file:
        for i, request_id in enumerate(ids):
            prompt = f"# {i}\n" + SNIPPETS[i % len(SNIPPETS)]
            line = {"id": request_id, "prompt": prompt, "max_tokens": max_tokens - i % 7}
            file.write(json.dumps(line | {"temperature": 0, "ignore_eos": True}) + "\n")
    return ids


def generate_command(
    requests: Path, answers: Path, *, sp: int, extra: Sequence[str] = ()
) -> list[str]:
    """The program's part of a command line. Few sequences at a time: answers arrive one by one."""
    layout = ["--sp", str(sp), "--dtype", "float32", "--device", "cpu", "--max-num-seqs", "3"]
    files = ["--input", str(requests), "--output", str(answers)]
    return [
        str(ROOT / "launch" / "generate.py"),
        *files,
        *layout,
        "--num-gpu-blocks-override",
        "512",
        *extra,
    ]


def num_answers(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def whole_lines(path: Path) -> list[str]:
    """Lines that were written to their end."""
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def texts_of(path: Path) -> Mapping[str, str]:
    """Text by id; fails on a line that is no record, an error, or an id that occurs twice."""
    texts: dict[str, str] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert record.get("error") is None, record
        assert record["id"] not in texts, record["id"]
        texts[record["id"]] = record["text"]
    return texts
