"""JSON objects of a checkpoint folder, read so that a damaged file is one line and never a wait."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from sps2_mega.errors import ConfigError

_LARGEST = 256 * 2**20  # bytes; the largest real ones are vocabularies of tens of megabytes


def read_json(path: Path) -> dict[str, Any]:
    """Content of a regular file of at most 256 MiB that holds one JSON object.

    Raises:
        ConfigError: it is absent, no regular file, too large, not JSON, or no object.
    """
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise ConfigError(f"cannot read {path}: it is nested too deeply") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def read_text(path: Path) -> str:
    """Text of a regular file of at most 256 MiB; a pipe or a device is not waited for.

    Raises:
        ConfigError: it is no regular file, or too large.
        OSError, ValueError: it cannot be read, or is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is not a regular file")
    if status.st_size > _LARGEST:
        raise ConfigError(f"{path} has {status.st_size} bytes (at most {_LARGEST} are read)")
    return path.read_text(encoding="utf-8")


def shown(value: object) -> str:
    """A value for an error message, on one line and cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
