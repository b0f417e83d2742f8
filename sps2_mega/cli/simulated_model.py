"""Architectures for `sps2 plan` and `sps2 simulate`."""

from __future__ import annotations

import dataclasses
import sys

from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.config import ModelConfig


def simulated_model(name: str) -> ModelConfig:
    """A model of model_configs/, without its sliding window, as later versions of it are.

    Raises:
        ConfigError: there is no such model.
    """
    model = named_model_file(name).config
    if model.sliding_window is None:
        return model
    print(f"note: {name} is simulated with full attention, not its window", file=sys.stderr)
    return dataclasses.replace(model, sliding_window=None)
