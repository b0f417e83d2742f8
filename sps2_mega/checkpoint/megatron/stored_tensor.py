"""Location of a tensor's bytes inside what `torch.save` wrote, so that parts can be read alone.

A `.distcp` file holds one such record per piece: a zip archive with a pickle (dtype, sizes,
strides) and the values as they lie in memory, uncompressed. Nothing of the pickle runs: it is read
through an allow-list of the few names that describe a tensor.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sps2_mega.errors import CheckpointError

SCRATCH_BYTES = 32 << 20
"""Most bytes that are read at once where values cannot go straight to where they are wanted."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DAMAGE = (
    *(OSError, EOFError, zipfile.BadZipFile, NotImplementedError, pickle.UnpicklingError),
    *(ValueError, TypeError, AttributeError, LookupError, RuntimeError, OverflowError, MemoryError),
)


@dataclass(frozen=True, slots=True)
class StoredValues:
    """Row-major values of a tensor at byte `start` of `file`."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def copy_rows(self, target: Tensor, first_row: int, columns: slice | None = None) -> None:
        """Fill `target` with rows from `first_row` on, of a tensor of one or more dimensions.

        `columns` selects along the second dimension. At most `SCRATCH_BYTES` (or one row) beyond
        `target` are in memory.

        Raises:
            CheckpointError: the file ends too early.
        """
        with self.file.open("rb", buffering=0) as file:
            row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
            file.seek(self.start + first_row * row_bytes)
            if columns is None and self._fits(target):
                self._fill(file, target)
                return
            step = max(1, SCRATCH_BYTES // max(1, row_bytes))
            for begin in range(0, len(target), step):
                rows = target[begin : begin + step]
                scratch = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
                self._fill(file, scratch)
                rows.copy_(scratch if columns is None else scratch[:, columns])

    def _fits(self, target: Tensor) -> bool:
        return target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()

    def _fill(self, file: IO[bytes], target: Tensor) -> None:
        view = memoryview(target.detach().reshape(-1).view(torch.uint8).numpy().data)
        while len(view):
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{self.file}: the file ends {len(view)} bytes too early")
            view = view[count:]


def locate(file: Path, start: int, length: int, where: str) -> StoredValues | None:
    """Find the values of the one tensor in a `torch.save` record of `length` bytes; None if they
    do not lie in row-major order.

    Raises:
        CheckpointError: there is something else, or the record is damaged; begins with `where`.
    """
    try:
        with file.open("rb") as opened:
            missing = start + length - opened.seek(0, io.SEEK_END)
            if missing > 0:
                raise CheckpointError(f"{where}: the file ends {missing} bytes too early")
            record = _Window(opened, start, length)
            with zipfile.ZipFile(record) as archive:  # type: ignore[arg-type]
                return _located(archive, record, file)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{where}: not a stored tensor: {error}") from None


def _located(archive: zipfile.ZipFile, record: _Window, file: Path) -> StoredValues | None:
    entries = {name.partition("/")[2]: name for name in archive.namelist()}
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise CheckpointError(f"{file}: stored on a big-endian machine, which is not supported")
    described = _Unpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
    if not isinstance(described, _Described):
        raise CheckpointError(f"{file}: expected a tensor, found {type(described).__name__}")
    info = archive.getinfo(entries[f"data/{described.key}"])
    shape, needed = described.shape, math.prod(described.shape) * described.dtype.itemsize
    if described.strides != _row_major(shape) and math.prod(shape) > 1:
        return None
    first = described.first * described.dtype.itemsize
    if info.compress_type != zipfile.ZIP_STORED or info.file_size < first + needed:
        raise CheckpointError(f"{file}: {info.file_size} bytes stored, {first + needed} announced")
    record.seek(info.header_offset)
    header = record.read(30)
    # A local header repeats the name and may have more padding than the directory says.
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    begin = record.start + info.header_offset + 30 + names + first
    return StoredValues(file, begin, described.dtype, shape)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@dataclass(frozen=True, slots=True)
class _Described:
    """A tensor as its pickle states it: where its storage is, and how it lies in it."""

    key: str
    dtype: torch.dtype
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(storage: Any, first: int, shape: Any, strides: Any, *_: Any) -> _Described:
    key, dtype = storage
    if not all(isinstance(n, int) and n >= 0 for n in (first, *shape, *strides)):
        raise ValueError("negative sizes")
    return _Described(key, dtype, first, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Reader of the pickle of one tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise CheckpointError(f"blocked {module}.{name}: a stored tensor needs no such name")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown reference {kind!r}")
        return str(key), dtype


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self.start, self._length, self._at = file, start, length, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} before the record")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        self._file.seek(self.start + self._at)
        data = self._file.read(count)
        self._at += len(data)
        return data
