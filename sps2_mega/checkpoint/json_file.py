"""JSON and YAML of a checkpoint folder, read so that a damaged file is one line, never a wait."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from sps2_mega.errors import ConfigError

_MOST_VALUES, _MOST_LEVELS = 10**6, 100
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


def read_yaml(path: Path) -> Any:
    """Plain values of a regular YAML file of at most 256 MiB.

    Raises:
        ConfigError: it cannot be read, is not YAML, holds more than plain values, or its aliases
            make it larger or deeper than any real one.
    """
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except (RecursionError, MemoryError):
        raise ConfigError(f"cannot read {path}: it is nested too deeply, or too large") from None
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    check_extent(content, path)
    return content


def check_extent(content: Any, where: str | Path) -> None:
    """Refuse nested lists and mappings that would fill memory as soon as they are printed.

    Raises:
        ConfigError: there are more than a million values, each counted as often as it is reached,
            or more than 100 levels.
    """
    if _extent(content, {}, 0) > _MOST_VALUES:
        raise ConfigError(f"{where} is nested too deeply, or holds too many values")


def _extent(value: Any, known: dict[int, int], depth: int) -> int:
    """Number of values in `value`; `known` has those of containers that were met before."""
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        return 1
    if depth > _MOST_LEVELS:
        return _MOST_VALUES + 1
    if id(value) not in known:
        known[id(value)] = _MOST_VALUES + 1  # where it holds itself
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_extent(item, known, depth + 1) for item in inner)
    return known[id(value)]


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
