"""Parts of tensors read from inside `torch.save` records equal the same parts of the tensors."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch

from sps2_mega.checkpoint.megatron import stored_tensor
from sps2_mega.checkpoint.megatron.stored_tensor import StoredValues, locate
from sps2_mega.errors import CheckpointError

BEFORE = b"another record"


def stored(tensor: object, folder: Path) -> tuple[Path, int, int]:
    """A file with the record of `tensor` between others: path, start and length."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    path = folder / "__0_0.distcp"
    path.write_bytes(BEFORE + buffer.getvalue() + b"the next one")
    return path, len(BEFORE), len(buffer.getvalue())


def located(tensor: object, folder: Path) -> StoredValues | None:
    return locate(*stored(tensor, folder), "here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_columns_of_a_stored_tensor(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(stored_tensor, "SCRATCH_BYTES", 200)  # several reads
    tensor = torch.arange(37 * 13, dtype=torch.float32).reshape(37, 13).to(dtype)
    values = located(tensor, tmp_path)
    assert (values.dtype, values.shape) == (dtype, (37, 13))
    for rows, columns in [(slice(37), None), (slice(5, 6), None), (slice(3, 30), slice(4, 11))]:
        expected = tensor[rows] if columns is None else tensor[rows, columns]
        for target_dtype in (dtype, torch.float32):
            whole = torch.full((50, expected.shape[1]), -1.0, dtype=target_dtype)
            target = whole[7 : 7 + len(expected)]
            values.copy_rows(target, rows.start or 0, columns)
            assert torch.equal(target, expected.to(target_dtype))
            assert (whole[:7] == -1).all() and (whole[7 + len(expected) :] == -1).all()


def test_a_target_of_any_strides(tmp_path):
    tensor = torch.randn(5, 8)
    target = torch.zeros(8, 5).t()
    located(tensor, tmp_path).copy_rows(target, 0)
    assert torch.equal(target, tensor)


def test_a_view_is_found_in_its_storage(tmp_path):
    tensor = torch.arange(40.0).reshape(8, 5)
    target = torch.empty(3, 5)
    located(tensor[2:7], tmp_path).copy_rows(target, 1)
    assert torch.equal(target, tensor[3:6])


def test_scalars_vectors_and_nothing(tmp_path):
    for tensor in (torch.arange(9.0), torch.empty(0, 4), torch.randn(4, 1, 3)):
        values = located(tensor, tmp_path)
        target = torch.empty_like(tensor)
        values.copy_rows(target, 0)
        assert torch.equal(target, tensor)


def test_another_order_of_values_is_left_to_torch(tmp_path):
    assert located(torch.randn(4, 6).t(), tmp_path) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([torch.ones(2)], "expected a tensor, found list"),
        ({"a": 1}, "expected a tensor, found dict"),
        (torch.device("cpu"), "blocked torch.device"),
    ],
    ids=["list", "dict", "device"],
)
def test_anything_else_is_refused(tmp_path, value, said):
    with pytest.raises(CheckpointError, match=said):
        located(value, tmp_path)


def test_damage_is_a_checkpoint_error(tmp_path):
    path, start, length = stored(torch.randn(300), tmp_path)
    for begin, size in [(start, length - 40), (start + 1, length - 1), (0, 10), (start, 10**12)]:
        with pytest.raises(CheckpointError, match=r"^here: (not a stored tensor|the file ends)"):
            locate(path, begin, size, "here")
    values = locate(path, start, length, "here")
    path.write_bytes(path.read_bytes()[: values.start + 100])
    with pytest.raises(CheckpointError, match="ends 1100 bytes too early"):
        values.copy_rows(torch.empty(300), 0)


def test_compressed_values_are_refused(tmp_path):
    path, start, length = stored(torch.zeros(1000), tmp_path)
    record = io.BytesIO(path.read_bytes()[start : start + length])
    packed = tmp_path / "packed"
    with zipfile.ZipFile(record) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="bytes stored, 4000 announced"):
        locate(packed, 0, packed.stat().st_size, "here")
