import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


def test_everything_starts_at_tiny_sizes():
    pytest.importorskip("triton")
    finished = run("--tiny")
    assert finished.returncode == 0, finished.stderr[-2000:]
    result = json.loads(finished.stdout)
    assert "mean nothing" in result["warning"]
    first = result["csa"][0]
    assert set(first["share_of_ideal"]) == {"csa triton", "csa torch"}
    assert first["flops_ratio"] < 1
    assert first["max_difference"] < 2e-2
    assert len(result["decode"][0]["share_of_copy"]) >= 3
    assert result["merge"][0]["seconds"].keys() == {"merge triton", "merge torch"}
    assert result["append"]["seconds"].keys() == {"append triton", "append torch"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure on")
def test_full_sizes_are_refused_without_a_device():
    finished = run()
    assert finished.returncode == 2
    assert "only --tiny runs on a CPU" in finished.stderr
