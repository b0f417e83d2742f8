"""The model of nearly all tests of the engine on several ranks."""

from __future__ import annotations

from typing import Any

import families
import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """EngineConfig's fields for the `llama3-rope` family; a test adds its own with `|`."""
    folder = tmp_path_factory.mktemp("llama3")
    families.save_family("llama3-rope", folder)
    return dict(model=str(folder), dtype="float32")
