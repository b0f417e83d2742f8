"""YAML files of model_configs/: a named architecture, the place of its weights, suggested degrees.

architecture: {every field of ModelConfig}
weights: sps2-tiny            # folder, relative to the file; null: not bundled
tokenizer: sps2-tiny          # likewise
suggested: {tp: 1, sp: 2}
csa: {degrees: [1, 4]}        # optional: sparse attention, unless the command line sets it
source: where the weights are published
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sps2_mega.bundled import bundled_folders
from sps2_mega.checkpoint.architecture import (
    check_keys,
    check_ranges,
    model_config_from_mapping,
)
from sps2_mega.checkpoint.json_file import read_yaml
from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.errors import ConfigError

_KEYS = ("architecture", "weights", "tokenizer", "suggested", "csa", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file of model_configs/, with absolute paths."""

    name: str
    config: ModelConfig
    weights: Path | None
    tokenizer: Path | None
    tp: int
    sp: int
    csa: CSAConfig | None
    source: str


def read_model_file(path: Path) -> ModelFile:
    """Read and check one file.

    Raises:
        ConfigError: not readable YAML, or an unknown, absent or mistyped key.
    """
    content = read_yaml(path)
    content = _mapping(content, str(path))
    check_keys(content, _KEYS, str(path))
    if absent := [key for key in ("architecture", "source") if key not in content]:
        raise ConfigError(f"{path}: needs {', '.join(absent)}")
    suggested = _mapping(content.get("suggested") or {}, f"{path}: suggested")
    check_keys(suggested, ("tp", "sp"), f"{path}: suggested")
    architecture = _mapping(content["architecture"], f"{path}: architecture")
    config = model_config_from_mapping(architecture, f"{path}: architecture")
    check_ranges(config, f"{path}: architecture")
    return ModelFile(
        name=path.stem,
        config=config,
        weights=_folder(content.get("weights"), path, "weights"),
        tokenizer=_folder(content.get("tokenizer"), path, "tokenizer"),
        tp=_degree(suggested.get("tp", 1), f"{path}: suggested: tp"),
        sp=_degree(suggested.get("sp", 1), f"{path}: suggested: sp"),
        csa=_csa(content.get("csa"), f"{path}: csa"),
        source=str(content["source"]),
    )


def model_files() -> dict[str, Path]:
    """Name -> file: first the files of ./model_configs, then those of the package."""
    files: dict[str, Path] = {}
    for folder in bundled_folders("model_configs"):
        for path in sorted(folder.glob("*.yaml")):
            files.setdefault(path.stem, path)
    return files


def named_model_file(name: str) -> ModelFile:
    """Read the file of a name.

    Raises:
        ConfigError: no such file, or an invalid one; the message lists the known names.
    """
    files = model_files()
    if name not in files:
        known = ", ".join(sorted(files)) or "none found"
        raise ConfigError(f"{name!r} is not a name in model_configs/ ({known})")
    return read_model_file(files[name])


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping, found {value!r}")
    return value


def _folder(value: Any, path: Path, key: str) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(f"{path}: {key} must be a folder or null, found {value!r}")
    return (path.parent / value).resolve()


def _csa(value: Any, where: str) -> CSAConfig | None:
    if value is None:
        return None
    given = dict(_mapping(value, where))
    check_keys(given, [field.name for field in dataclasses.fields(CSAConfig)], where)
    if "degrees" not in given:
        raise ConfigError(f"{where}: needs degrees")
    for name in ("degrees", "spans"):
        if name in given and not (name == "spans" and given[name] is None):
            if not isinstance(given[name], list):
                raise ConfigError(
                    f"{where}: {name} must be a list of integers, found {given[name]!r}"
                )
            given[name] = tuple(_degree(number, f"{where}: {name}") for number in given[name])
    for name in ("sinks", "halo", "tail", "block"):
        number = given.get(name, 0)
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ConfigError(f"{where}: {name} must be an integer >= 0, found {number!r}")
    if not isinstance(given.get("sample_queries", False), bool):
        raise ConfigError(f"{where}: sample_queries must be true or false")
    return CSAConfig(**given)


def _degree(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where} must be an integer >= 1, found {value!r}")
    return value
