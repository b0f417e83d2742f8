"""EngineConfig as a plain mapping and back, for processes that are told their configuration as
JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sps2_mega.config import EngineConfig


def parts_of_engine_config() -> dict[str, type]:
    """The fields of EngineConfig that are configurations of their own, with their classes."""
    factories: dict[str, Any] = {
        f.name: f.default_factory for f in dataclasses.fields(EngineConfig)
    }
    return {name: part for name, part in factories.items() if isinstance(part, type)}


def engine_config_from_mapping(values: Mapping[str, Any]) -> EngineConfig:
    """The inverse of `dataclasses.asdict`, also after JSON, which knows lists but no tuples."""
    parts = parts_of_engine_config()
    return EngineConfig(
        **{
            name: parts[name](
                **{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
            )
            if name in parts
            else value
            for name, value in values.items()
        }
    )
