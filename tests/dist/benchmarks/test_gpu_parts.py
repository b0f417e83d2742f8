"""The parts of the GPU measurements that start an engine, at tiny sizes on the CPU: every case
gives its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import run_ranks

CASES = {
    "decode": ({"decode", "decode mixed"}, "share_of_bound"),
    "prefill": ({"prefill"}, "tokens_per_s"),
    "host_time": ({"host"}, "pieces"),
    "rank_share": ({"rank share, layer", "rank share, attention"}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_every_case_of_a_part_is_measured(name, tmp_path):
    file = tmp_path / "rows"
    run_ranks(part_on_rank, 1, name, str(file), timeout=120)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    cases, field = CASES[name]
    assert {row["case"] for row in rows} == cases
    for row in rows:
        assert "error" not in row and "skipped" not in row
        assert field is None or row[field]


def part_on_rank(rank: int, name: str, file: str) -> None:
    import importlib

    import torch

    from benchmarks.gpu.part import Part
    from benchmarks.gpu.sizes import TINY

    part = Part(
        name=name,
        sizes=TINY,
        device=torch.device("cpu"),
        deadline=float("inf"),
        file=Path(file),
    )
    importlib.import_module(f"benchmarks.gpu.{name}").run(part)
