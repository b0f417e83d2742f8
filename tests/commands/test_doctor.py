"""The doctor: version bounds, two packages called apex, exit status, both forms of the report."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sps2_mega.cli import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder_on_path(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("version", "needed", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.11", ">=2.11.0,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11,<2.14", False),
        ("0.16.1", ">=0.16,<0.17", True),
        ("1.0.7", ">=1.0.8", False),
        ("3.0.0rc1", ">=3", True),
        ("7.1", "", True),
    ],
)
def test_version_bounds(version, needed, fits):
    assert doctor.within(version, needed) is fits


def test_all_declared_dependencies_are_understood():
    requirements = doctor.requirements()
    assert any(requirement.startswith("torch") for requirement in requirements)
    for requirement in requirements:
        _, needed = doctor.split_requirement(requirement)
        doctor.within("1.2.3", needed)


@pytest.mark.parametrize(
    ("condition", "needed"), [("python_version >= '3.8'", True), ("python_version < '3'", False)]
)
def test_a_requirement_holds_where_its_condition_does(condition, needed):
    assert doctor.needed_here(f"numpy>=2.0; {condition}") is needed
    assert doctor.split_requirement(f"numpy>=2.0; {condition}") == ("numpy", ">=2.0")


def test_without_a_checkout_the_installed_package_declares_them(monkeypatch, tmp_path):
    declared = ["torch>=2.11,<2.14", 'pytest>=8; extra == "test"']
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    assert doctor.requirements() == declared[:1]


def test_it_runs_where_nothing_is_installed(tmp_path):
    """-S: no site-packages."""
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "tools" / "doctor.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={},
    )
    assert done.returncode == 1, done.stderr
    assert "not installed (needed: >=2.11,<2.14)" in done.stdout


def test_a_package_that_is_missing_or_too_old_is_named_with_what_is_needed(monkeypatch):
    absent = doctor.required_package("no-such-package-9>=1.2,<2")
    assert (absent.status, absent.required) == ("absent", True)
    assert "needed: >=1.2,<2" in absent.detail
    monkeypatch.setattr(doctor, "installed_version", lambda name: "2.4.0")
    wrong = doctor.required_package("torch>=2.11,<2.14")
    assert wrong.status == "wrong" and wrong.detail == "2.4.0 (needed: >=2.11,<2.14)"


def write_package(folder: Path, *files: str) -> None:
    for name in ("__init__.py", *files):
        path = folder / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('code of a package that must not run')")


def test_nvidias_apex_is_recognised_without_running_it(folder_on_path):
    write_package(
        folder_on_path, "normalization/fused_layer_norm.py", "multi_tensor_apply/__init__.py"
    )
    finding = doctor.apex()
    assert finding.status == "ok" and finding.detail == "NVIDIA's, without fused layer norm kernels"


def test_the_unrelated_apex_is_recognised_without_running_it(folder_on_path):
    write_package(folder_on_path, "lib/libapex.py", "scaffolds/__init__.py", "models.py")
    finding = doctor.apex()
    assert finding.status == "wrong" and "pip uninstall apex" in finding.detail
    assert not finding.required, "it can be lived with"


def test_transformer_engine_is_found_by_its_folder(folder_on_path, monkeypatch):
    (folder_on_path / "transformer_engine").mkdir()
    (folder_on_path / "transformer_engine" / "__init__.py").write_text("raise SystemExit")
    assert doctor.transformer_engine().status == "ok"


def test_memory_is_read_in_kib():
    text = "MemTotal:       24641536 kB\nMemFree: 1 kB\nMemAvailable:   12320768 kB\n"
    assert doctor.memory_gib(text) == (23.5, 11.75)


def test_this_machine_is_fit_and_both_reports_agree(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    names = {finding["name"] for finding in report["findings"]}
    assert {"torch", "megatron-core", "deepspeed", "gloo", "apex", "triton", "`deepspeed`"} <= names
    assert report["used"]["communication"] in ("gloo", "nccl")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "will be used:" in text and text.rstrip().endswith("fit to run sps2_mega")


def test_something_required_that_is_missing_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requirements", lambda: ["no-such-package-9>=1"])
    monkeypatch.setattr(doctor, "torch_facts", list)
    assert doctor.main([]) == 1
    assert "NOT fit: no-such-package-9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "device", "communication"),
    [
        ([], "cpu", "gloo"),
        (["cuda:0", "cuda:1", "nccl"], "cuda (2)", "nccl"),
        (["cuda:0"], "cuda (1)", "gloo"),
    ],
)
def test_what_will_be_used_follows_what_is_there(names, device, communication):
    plan = doctor.what_will_be_used([doctor.Finding(name, "ok", "") for name in names])
    assert (plan["device"], plan["communication"]) == (device, communication)
