"""Crafted checkpoints that would run code are refused by name, and nothing of them runs."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import signal
import sys
import zipfile
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint

from sps2_mega.checkpoint.megatron.safe_pickle import (
    Record,
    load_tensor,
    load_torch_file,
    read_records,
)
from sps2_mega.checkpoint.megatron.settings.table import check_settings
from sps2_mega.checkpoint.source import open_checkpoint
from sps2_mega.errors import CheckpointError, ConfigError


class Attack:
    """Object whose unpickling calls `function(*args)`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def attacks(trace: Path) -> dict[str, Attack]:
    return {
        "system": Attack(os.system, f"touch {trace}"),
        "exec": Attack(exec, f"open({str(trace)!r}, 'w')"),
        "getattr": Attack(getattr, int, "__subclasses__"),
        "open": Attack(io.open, str(trace), "w"),
        "partial": Attack(__import__("functools").partial, os.system, f"touch {trace}"),
    }


NAMES = list(attacks(Path()))


@pytest.mark.parametrize("name", NAMES)
def test_metadata_that_would_run_code_is_refused(tmp_path: Path, name: str) -> None:
    folder, trace = tmp_path / "iter_0000001", tmp_path / "trace"
    folder.mkdir()
    (folder / "metadata.json").write_text("{}")
    (folder / ".metadata").write_bytes(pickle.dumps({"state": attacks(trace)[name]}))
    with pytest.raises(CheckpointError, match="blocked") as caught:
        read_records(folder / ".metadata")
    assert "data only" in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["args", "optimizer"])
def test_common_pt_that_would_run_code_is_refused(tmp_path: Path, name: str, key: str) -> None:
    folder, trace = tmp_path / "iter_0000001", tmp_path / "trace"
    folder.mkdir()
    torch.distributed.checkpoint.save(
        {}, storage_writer=torch.distributed.checkpoint.FileSystemWriter(folder), no_dist=True
    )
    torch.save({key: attacks(trace)[name]}, folder / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: blocked"):
        open_checkpoint(folder)
    assert not trace.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_legacy_file_that_would_run_code_is_refused(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    folder = tmp_path / "iter_0000007" / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    torch.save({"model": {}, "x": attacks(trace)[name]}, folder / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt: blocked"):
        open_checkpoint(tmp_path)
    assert not trace.exists()


def test_the_message_names_the_blocked_global(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack(os.system, "true")))
    with pytest.raises(CheckpointError, match=r"blocked posix\.system"):
        read_records(tmp_path / ".metadata")
    torch.save(Attack(os.system, "true"), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"blocked posix\.system"):
        load_torch_file(tmp_path / "x.pt")


def test_a_stored_tensor_that_would_run_code_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    buffer = io.BytesIO()
    torch.save(Attack(os.system, f"touch {trace}"), buffer)
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        load_tensor(buffer.getvalue(), "piece")
    assert not trace.exists()


def test_an_allowed_class_is_not_a_way_to_others(tmp_path: Path) -> None:
    # A dotted name would reach through an allowed module to whatever it imported.
    payload = b"\x80\x04\x8c\x05torch\x8c\x0bSize.mro.os\x93."
    (tmp_path / ".metadata").write_bytes(payload)
    with pytest.raises(CheckpointError, match="blocked"):
        read_records(tmp_path / ".metadata")


def test_names_of_megatron_are_kept_as_inert_records(tmp_path: Path) -> None:
    class Fake:
        def __reduce__(self) -> tuple[Any, ...]:
            return (argparse.Namespace, (), {"hidden_size": 7})

    path = tmp_path / "common.pt"
    torch.save({"args": Fake()}, path)
    _rename_global(path, b"argparse\nNamespace", b"megatron.nowhere\nThing")
    loaded = load_torch_file(path)
    assert type(loaded["args"]).__name__ == "Thing"
    assert loaded["args"].hidden_size == 7


ENUMS = {
    # class, bases, value, what is read
    "megatron.core.transformer.enums.AttnBackend": ((Enum,), 5, "auto"),
    "megatron.core.transformer.enums.AttnMaskType": ((Enum,), 2, "causal"),
    "megatron.core.transformer.enums.CudaGraphModule": ((Enum,), 6, "mamba"),
    "megatron.core.enums.Fp8Recipe": ((str, Enum), "blockwise", "blockwise"),
    "megatron.core.enums.ModelType": ((Enum,), 1, "encoder_or_decoder"),
    "megatron.core.transformer.enums.LayerType": ((Enum,), 3, "LayerType(3)"),
    "megatron.core.enums.Fp12Recipe": ((str, Enum), "mx", "Fp12Recipe('mx')"),
    "megatron.core.enums.AttnBackend": ((Enum,), 9, "AttnBackend(9)"),
    "megatron.core.transformer.enums.AttnType": ((Enum,), 9, "AttnType(9)"),
}


@pytest.mark.parametrize("path", ENUMS)
def test_enums_become_the_names_of_their_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    bases, value, expected = ENUMS[path]
    module, _, name = path.rpartition(".")
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    members = {"one": value, "other": "unused"}
    kind: Any = bases[-1](name, members, module=module, type=bases[0] if bases[1:] else None)
    setattr(sys.modules[module], name, kind)
    torch.save({"args": argparse.Namespace(x=kind.one, y=[kind.one])}, tmp_path / "common.pt")
    monkeypatch.undo()
    args = load_torch_file(tmp_path / "common.pt")["args"]
    assert not isinstance(args.x, Enum)
    assert isinstance(args.x, str) == ("(" not in expected)
    assert (args.x if isinstance(args.x, str) else repr(args.x)) == expected
    assert repr(args.y) == f"[{args.x!r}]"
    with pytest.raises(ConfigError, match=re.escape(f"x={args.x!r} is not supported")):
        check_settings(vars(args), "here")


def test_signals_are_named_and_records_print_what_they_hold(tmp_path: Path) -> None:
    torch.save(argparse.Namespace(exit_signal=signal.SIGTERM), tmp_path / "x.pt")
    assert load_torch_file(tmp_path / "x.pt").exit_signal == "SIGTERM"
    record = Record(1)
    record.__setstate__({"itself": record, "size": 2})
    assert repr(record) == "Record(1, itself=..., size=2)"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name, content in {
        "empty": b"",
        "text": b"hello world",
        "cut": pickle.dumps([1, 2])[:-3],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_records(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            load_torch_file(tmp_path / name)


def test_a_tensor_file_may_not_hold_another_value() -> None:
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    with pytest.raises(CheckpointError, match="expected a tensor, found list"):
        load_tensor(buffer.getvalue(), "piece")


def _rename_global(path: Path, old: bytes, new: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for info, data in entries.items():
            if info.filename.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            archive.writestr(info.filename, data)


def test_names_that_other_libraries_allow_are_not_taken(tmp_path: Path) -> None:
    """megatron-core allows enums and `signal.Signals` as soon as it is imported."""
    path = tmp_path / "x.pt"
    torch.save({"value": Attack(Fraction, 1, 2)}, path)
    with torch.serialization.safe_globals([Fraction]):
        with pytest.raises(CheckpointError, match=r"blocked fractions\.Fraction"):
            load_torch_file(path)
        assert torch.load(path, weights_only=True)["value"] == Fraction(1, 2)  # as before
