"""Megatron's spelling of the canonical weights: wrappers, fused layer norms, non-weights."""

from __future__ import annotations

import re

_NOT_WEIGHTS = re.compile(
    r"^(chained_\d+\.)?optimizer\.|(^|[./])_extra_state|\._extra_state"
    r"|^(rng_state|rerun_state_machine_state|opt_param_scheduler|args|iteration|train_state)\b"
)
_WRAPPERS = re.compile(r"^((model\d*|module)\.)+")
_FUSED_NORMS = {
    # Transformer Engine keeps a layer norm's weights in the linear layer after it.
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def canonical_name(name: str) -> str | None:
    """Canonical spelling of a name in a Megatron checkpoint; None if it is no model weight.

    Layers may be numbered (`decoder.layers.3.mlp..`) or stacked (`decoder.layers.mlp..`).
    """
    if _NOT_WEIGHTS.search(name):
        return None
    name = _WRAPPERS.sub("", name)
    if name.startswith("decoder.layers."):
        for fused, plain in _FUSED_NORMS.items():
            name = name.replace(f".{fused}", f".{plain}")
    return name


def stored_name(part: str) -> str:
    """Spelling of `part`, a canonical name within one layer, in distributed checkpoints."""
    for fused, plain in _FUSED_NORMS.items():
        if part.startswith(plain):
            return fused + part.removeprefix(plain)
    return part
