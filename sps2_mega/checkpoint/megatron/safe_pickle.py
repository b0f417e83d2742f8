"""Reading of pickled checkpoint files without giving them a way to run code.

Two kinds of files have a reader each, both with a list of allowed names and an error that gives the
refused name. Classes we do not need become an inert `Record` that only keeps what the file states.

    .metadata               a bare pickle: `read_records`, our own unpickler
    common.pt, mp_rank *.pt torch's zip format: `load_torch_file`, torch's weights-only unpickler
    objects in *.distcp     the same format: `load_torch_bytes`, the same unpickler
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sps2_mega.checkpoint.megatron.enum_members import MEMBERS, TEXTS
from sps2_mega.errors import CheckpointError


class Record:
    """Constructor arguments and state of a pickled object whose class is not loaded.

    It prints as a call of its class, `LayerType(3)`, so that a message can show what was found.
    """

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__} without {name}")

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        state = dict(vars(self))
        args = state.pop("args", ())
        shown = [repr(value) for value in (args if isinstance(args, tuple) else (args,))]
        shown += [f"{name}={value!r}" for name, value in state.items()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def _size(dims: Any = ()) -> tuple[int, ...]:
    return tuple(dims)


_DCP = "torch.distributed.checkpoint"
_RECORDS = {
    f"{_DCP}.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata "
    "StorageMeta "
    "TensorProperties ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem": "_StorageInfo",
    f"{_DCP}.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.serialization": "_get_layout",
    "torch": "memory_format",
    # the folder that torch's own writer was given
    "pathlib": "PosixPath WindowsPath PurePosixPath",
    "pathlib._local": "PosixPath WindowsPath PurePosixPath",
}
_DTYPES = [
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
]
_METADATA_NAMES: dict[tuple[str, str], Any] = {
    **{(module, name): Record for module, names in _RECORDS.items() for name in names.split()},
    **{("torch", name): name for name in _DTYPES},
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
}

# Errors of unpicklers on bytes that are no pickle; lengths read from garbage can exceed all memory.
_DAMAGE = (
    *(OSError, EOFError, MemoryError, OverflowError, pickle.UnpicklingError),
    *(ValueError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError),
)
_WHY_BLOCKED = (
    "a checkpoint must hold data only, and this name could run code when the file is read"
)
_INERT_PACKAGES = ("megatron.", "numpy.", "transformer_engine.")
_INERT_NAMES = (
    "types.SimpleNamespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
    "_io.BytesIO",
)


def read_records(path: Path) -> Any:
    """Content of a torch.distributed.checkpoint `.metadata` file, as `Record`s and plain values.

    Raises:
        CheckpointError: the file needs any other name (nothing of it has run), or is damaged.
    """
    try:
        return _MetadataUnpickler(path).load()
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint metadata file: {error!r}"
        ) from None


def load_torch_file(path: Path, *, mmap: bool = False) -> Any:
    """Load a file written by torch.save, tensors on the CPU (mapped from the file with `mmap`).

    Raises:
        CheckpointError: the file needs a name that is not allowed (nothing of it has run), or is
            damaged.
    """
    return _load_data(str(path), str(path), mmap)


def load_torch_bytes(data: bytes, where: str) -> Any:
    """Load any object from the bytes that torch.save made of it, by the rules of `load_torch_file`.

    Raises:
        CheckpointError: the bytes need a name that is not allowed (nothing of them has run), or
            are damaged.
    """
    return _load_data(io.BytesIO(data), where, mmap=False)


def _load_data(file: str | io.BytesIO, where: str, mmap: bool) -> Any:
    try:
        with _no_foreign_globals():
            asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if isinstance(file, io.BytesIO):
                file.seek(0)
            blocked = [name for name in asked if not _is_inert(name)]
            if blocked:
                names = ", ".join(sorted(blocked))
                raise CheckpointError(f"{where}: blocked {names}: {_WHY_BLOCKED}")
            stand_ins: list[Any] = [(_stand_in(name), name) for name in asked]
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{where}: not a readable torch file: {error!r}") from None


@contextmanager
def _no_foreign_globals() -> Iterator[None]:
    """Take the names away that other libraries have allowed torch to load.

    megatron-core allows its own classes once it is imported, so what a file gave would depend on
    that.
    """
    foreign = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(foreign)


def load_tensor(data: bytes, where: str) -> torch.Tensor:
    """Load one tensor from the bytes that torch.save made of it.

    Raises:
        CheckpointError: the bytes hold anything else.
    """
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise CheckpointError(f"{where}: not a stored tensor: {error}") from None
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{where}: expected a tensor, found {type(value).__name__}")
    return value


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(path.read_bytes()))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_NAMES:
            raise CheckpointError(f"{self._path}: blocked {module}.{name}: {_WHY_BLOCKED}")
        return _METADATA_NAMES[module, name]


def _is_inert(name: str) -> bool:
    return name == "argparse.Namespace" or name in _INERT_NAMES or name.startswith(_INERT_PACKAGES)


def _stand_in(name: str) -> type:
    if name == "argparse.Namespace":
        return argparse.Namespace
    if name in MEMBERS or name in TEXTS:
        return _enum_stand_in(name)
    # torch keeps allowed classes by name, so each name needs a class of its own.
    return type(name.rpartition(".")[2], (Record,), {})


def _enum_stand_in(name: str) -> type:
    """A class that gives a member's name, or its text; what it does not know stays a `Record`."""
    kind = name.rpartition(".")[2]
    unknown = type(kind, (Record,), {})

    def member(_: type, value: Any) -> Any:
        known = value if name in TEXTS else MEMBERS[name].get(value)
        return known if isinstance(known, str) else unknown(value)

    return type(kind, (), {"__new__": member})
