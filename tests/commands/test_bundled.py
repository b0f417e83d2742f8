"""Files beside the package are found, also those of an installed wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sps2_mega.bundled import FOLDERS, INSIDE, bundled_folders

ROOT = Path(__file__).resolve().parents[2]
USE = """
from sps2_mega.bundled import bundled_prompts
from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.simulator.hardware import hardware_names, load_hardware
from sps2_mega.simulator.trace_files import BUNDLED, read_trace, trace_path
hardware = load_hardware("h200", inter_node="rdma-100g")
print(named_model_file("sps2-tiny").weights.is_dir(), hardware.gpu)
lengths = [len(read_trace(name, limit=3)) for name in BUNDLED]
print(len(hardware_names()), lengths, trace_path("mooncake"))
print(bundled_prompts())
"""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_where_the_user_works_goes_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, last = bundled_folders(name)
    assert (first, second) == (tmp_path / name, ROOT / name)
    assert last == ROOT / "sps2_mega" / INSIDE / name and not last.exists()


def test_a_wheel_brings_its_models_hardware_and_traces(tmp_path):
    pytest.importorskip("setuptools")
    built = tmp_path / "built"
    commands = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(built)]
    subprocess.run([sys.executable, "setup.py", "-q", *commands], cwd=ROOT, check=True)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
        check=True,
    )
    models, traces, prompts = done.stdout.splitlines()
    assert models == "True NVIDIA H200 SXM 141 GB"
    assert traces.startswith("5 [3, 3, 3, 3, 3] ") and str(built) in traces
    assert Path(prompts).is_file() and prompts.startswith(str(built))
