"""Sliding window of a Hugging Face config.json, which must be the same for all layers.

Families state it in three ways: a window alone (Mistral), a switch with the first layer that has it
(Qwen), and a kind per layer (`layer_types`), which decides where it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sps2_mega.errors import ConfigError

# Where the fields are absent.
_WINDOW = 4096
_QWEN_FULL_LAYERS = 28


def window_from_hf(family: str, hf: Mapping[str, Any], num_layers: int) -> int | None:
    """The window of all layers in tokens, the token itself included; None: full attention.

    Raises:
        ConfigError: layers differ, or have a window of unknown size.
    """
    if family == "mistral":
        window = hf.get("sliding_window", _WINDOW)
    else:
        used = family != "llama" and hf.get("use_sliding_window", False)
        window = hf.get("sliding_window", _WINDOW) if used else None
    # AutoModel takes a Mistral with layer types for a Ministral, whose layers follow them.
    if hf.get("layer_types") is not None:
        if _kind_of_layers(hf["layer_types"], num_layers) == "full_attention":
            return None
        if window is None:
            raise ConfigError(
                "layer_types has sliding_attention, and no window is in use (sliding_window="
                f"{hf.get('sliding_window')}, use_sliding_window={hf.get('use_sliding_window')})"
            )
        return int(window)
    full = 0 if family == "mistral" else hf.get("max_window_layers", _QWEN_FULL_LAYERS)
    if window is not None and 0 < full < num_layers:
        raise ConfigError(
            f"use_sliding_window=True with max_window_layers={full} of {num_layers} layers mixes "
            "two kinds of attention: one kind for all layers is needed"
        )
    return None if window is None or full else int(window)


def _kind_of_layers(stated: list[str], num_layers: int) -> str:
    kinds = sorted(set(stated))
    if len(kinds) > 1 or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"layer_types has {' and '.join(kinds)}: full_attention or sliding_attention for all "
            "layers is needed"
        )
    if len(stated) != num_layers:
        raise ConfigError(
            f"layer_types has {len(stated)} entries for num_hidden_layers={num_layers}"
        )
    return kinds[0]
