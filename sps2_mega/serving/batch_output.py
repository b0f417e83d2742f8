"""Output file of a batch: one complete line per finished request, even after a crash.

    out.jsonl             records in the order in which requests finished
    out.jsonl.state.json  hash of the input and the settings that change text, so that
                          --resume refuses another input or other settings

Each record is one flushed write, so a crash tears at most the last line, which `--resume` cuts
off. `batch_records` decides the content of records.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sps2_mega.errors import ConfigError
from sps2_mega.serving.batch_input import BadLine, GoodLine

logger = logging.getLogger(__name__)

_STATE_VERSION = 1


class OutputMode(enum.Enum):
    NEW = "new"
    RESUME = "resume"
    OVERWRITE = "overwrite"


class BatchOutput:
    """Output file with one record per answered line, by id, or by line number for bad lines."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file
        self._answered: set[str] = set()
        self._failed_lines: set[int] = set()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        mode: OutputMode,
        fingerprint: Mapping[str, Any],
        retry_errors: bool = False,
    ) -> BatchOutput:
        """Open `path` for this run only; a resumed run must have the same `fingerprint`.

        Raises:
            ConfigError: the file cannot be written, exists without a mode that handles it, is being
                written by another run, or belongs to another input or other settings.
        """
        exists = path.exists()
        if exists and not path.is_file():
            raise ConfigError(f"output {path} is not a file")
        # A run that failed before its first answer leaves an empty file, which holds no work.
        begun = exists and path.stat().st_size > 0
        if begun and mode is OutputMode.NEW:
            raise ConfigError(
                f"output {path} exists; --resume continues it, --overwrite starts anew"
            )
        if not path.parent.is_dir():
            raise ConfigError(f"output folder {path.parent} does not exist")
        try:
            file = path.open("r+b" if exists else "x+b")
        except OSError as error:
            raise ConfigError(f"output {path} cannot be written: {error.strerror}") from error
        output = cls(path, file)
        try:
            _lock(file, path)
            if begun and mode is OutputMode.RESUME:
                _check_state(path, fingerprint)
                output._take_over(retry_errors)
            else:
                file.truncate(0)
                _write_state(path, fingerprint)
        except BaseException:
            file.close()
            raise
        return output

    @property
    def num_answered(self) -> int:
        """Number of records with an answer from earlier runs."""
        return len(self._answered)

    @property
    def num_failed(self) -> int:
        """Number of error records from earlier runs."""
        return len(self._failed_lines)

    def has(self, line: GoodLine | BadLine) -> bool:
        """Whether an earlier run wrote this line's record."""
        if line.number in self._failed_lines:
            return True
        return isinstance(line, GoodLine) and str(line.line_id) in self._answered

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line and flush it."""
        try:
            line = json.dumps(record, ensure_ascii=False).encode()
        # An id may hold half a surrogate pair, which only escapes can spell.
        except UnicodeEncodeError:
            line = json.dumps(record).encode()
        self._file.write(line + b"\n")
        self._file.flush()

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Sync all lines to disk; safe to call twice."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()

    def _take_over(self, retry_errors: bool) -> None:
        """Read earlier records and cut off a torn last line; `retry_errors` drops error records."""
        whole = 0
        dropped = False
        keep: list[tuple[int, int]] = []
        self._file.seek(0)
        for number, raw in enumerate(self._file, start=1):
            if not raw.endswith(b"\n"):
                break
            failed = self._note(number, raw, retry_errors)
            dropped = dropped or (failed and retry_errors)
            if not (failed and retry_errors):
                keep.append((whole, len(raw)))
            whole += len(raw)
        if dropped:
            self._rewrite(keep)
        else:
            self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def _note(self, number: int, raw: bytes, retry_errors: bool) -> bool:
        try:
            record = json.loads(raw)
            failed = record.get("error") is not None
            if not failed:
                self._answered.add(str(record.get("custom_id", record.get("id"))))
            elif not retry_errors:
                self._failed_lines.add(record["error"]["line"])
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ConfigError(
                f"output {self.path}, line {number}: not a record of this program; "
                "--overwrite starts anew"
            ) from None
        return failed

    def _rewrite(self, keep: list[tuple[int, int]]) -> None:
        """Replace the file by the kept lines; a crash leaves either the old or the new one."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        file = temporary.open("w+b")
        _lock(file, temporary)
        for start, length in keep:
            self._file.seek(start)
            file.write(self._file.read(length))
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._file.close()
        self._file = file


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"output {path} is being written by another run") from None
    except OSError as error:
        logger.debug("no lock on %s (%s): one writer is then the user's to ensure", path, error)


def state_path(output: Path) -> Path:
    return output.with_name(output.name + ".state.json")


def _check_state(output: Path, fingerprint: Mapping[str, Any]) -> None:
    path = state_path(output)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        before = state["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--resume needs {path}, which says what {output.name} belongs to; "
            "it is missing or damaged (--overwrite starts anew)"
        ) from None
    now = json.loads(json.dumps(fingerprint))
    differences = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ConfigError(
            f"--resume would mix answers of different runs in {output}: {'; '.join(differences)}"
        )


def _write_state(output: Path, fingerprint: Mapping[str, Any]) -> None:
    path = state_path(output)
    temporary = path.with_name(path.name + ".tmp")
    state = {"version": _STATE_VERSION, "fingerprint": dict(fingerprint)}
    temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
