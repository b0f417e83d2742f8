"""EngineConfig to and from a plain mapping, for ranks that receive their configuration as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sps2_mega.config import EngineConfig


def parts_of_engine_config() -> dict[str, type]:
    """Fields of EngineConfig that are dataclasses themselves, with their classes."""
    factories: dict[str, Any] = {
        f.name: f.default_factory for f in dataclasses.fields(EngineConfig)
    }
    return {name: part for name, part in factories.items() if isinstance(part, type)}


def engine_config_from_mapping(values: Mapping[str, Any]) -> EngineConfig:
    """Inverse of `dataclasses.asdict`, also after JSON, which has lists but no tuples."""
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
