"""Rotary settings of Megatron -> RopeConfig's fields, by megatron-core's formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sps2_mega.checkpoint.megatron.settings.table import is_empty, of_bridge
from sps2_mega.checkpoint.megatron.settings.values import number, refuse
from sps2_mega.config import RopeConfig
from sps2_mega.errors import ConfigError

# Constants of megatron-core's llama3 rule; only the factor is a parameter there.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_FACTOR = 8.0
"""Factor of every model that Megatron-LM builds: it does not hand its argument on."""
_OLD_BRIDGE = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")


def rope_fields(args: Mapping[str, Any], head_dim: int, where: str) -> dict[str, Any] | None:
    """Fields of RopeConfig; None for learned positions.

    Raises:
        ConfigError: the kind of positions, or a value, is not supported.
    """
    kind = args.get("position_embedding_type", "learned_absolute")
    if args.get("use_rotary_position_embeddings"):
        kind = "rope"  # the older switch, which sets the newer one
    if kind == "learned_absolute":
        return None
    if kind not in ("rope", "yarn"):
        why = "known are learned_absolute, rope, yarn"
        raise refuse(where, "position_embedding_type", kind, why)
    # yarn divides by the logarithm of the base.
    theta = number(args, ("rotary_base",), where, above=1 if kind == "yarn" else 0)
    fields: dict[str, Any] = {"theta": 10000.0 if theta is None else theta}
    if kind == "yarn":
        _check_pairs(head_dim, where)
        # megatron-core's rule rotates the whole head, whatever rotary_percent says.
        if args.get("rotary_interleaved"):
            raise refuse(where, "rotary_interleaved", True, "not with yarn, as in Megatron")
        return fields | _yarn(args, where)
    if args.get("rotary_interleaved"):
        fields["interleaved"] = True
    return fields | _rotary_dim(args, head_dim, where) | _scaling(args, where)


def rope_to_args(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """Megatron-LM's arguments for rotary positions, as far as it has them."""
    args: dict[str, Any] = {
        "rotary_base": int(rope.theta) if rope.theta.is_integer() else rope.theta,
        "rotary_percent": 1.0 if rope.rotary_dim is None else rope.rotary_dim / head_dim,
        "rotary_interleaved": rope.interleaved,
        "use_rope_scaling": rope.scaling == "llama3",
        "rope_scaling_factor": rope.factor if rope.scaling == "llama3" else LLAMA3_FACTOR,
        "rotary_seq_len_interpolation_factor": rope.factor if rope.scaling == "linear" else None,
    }
    if rope.scaling == "yarn":
        args |= {
            "position_embedding_type": "yarn",
            "rotary_scaling_factor": rope.factor,
            "yarn_original_max_position_embeddings": rope.original_max_position_embeddings,
            "yarn_beta_fast": rope.beta_fast,
            "yarn_beta_slow": rope.beta_slow,
            "yarn_correction_range_round_to_int": rope.truncate,
            "mscale": 1.0 if rope.mscale is None else rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim or 0.0,
        }
    return args


def _rotary_dim(args: Mapping[str, Any], head_dim: int, where: str) -> dict[str, Any]:
    percent = number(args, ("rotary_percent",), where)
    if percent is None or percent >= 1.0:
        _check_pairs(head_dim, where)
        return {}
    rotary_dim = int(head_dim * percent)
    if rotary_dim < 2 or rotary_dim % 2:
        why = f"it rotates {rotary_dim} of {head_dim} elements, and an even number is needed"
        raise refuse(where, "rotary_percent", percent, why)
    return {"rotary_dim": rotary_dim}


def _check_pairs(head_dim: int, where: str) -> None:
    if head_dim % 2:
        raise refuse(where, "kv_channels", head_dim, "its elements rotate in pairs")


def _scaling(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    name = "rope_scaling" if args.get("rope_scaling") else "use_rope_scaling"
    given = {key: number(args, (key,), where, above=0) for key in _OLD_BRIDGE}
    old = {key: value for key, value in given.items() if value is not None}
    linear = number(args, ("seq_len_interpolation_factor",), where, above=0)
    if args.get(name) and old:
        raise refuse(where, name, True, f"not together with {', '.join(old)}")
    if args.get(name) or old:
        if linear is not None and linear != 1.0:
            why = f"not together with {name}"
            raise refuse(where, "seq_len_interpolation_factor", linear, why)
        return {"scaling": "llama3"} | (_old_llama3(old, where) if old else _llama3(args, where))
    if linear is None or linear == 1.0:
        return {}
    return {"scaling": "linear", "factor": linear}


def _llama3(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    factor = number(args, ("rope_scaling_factor",), where, above=0)
    if args.get("rope_scaling"):
        if factor is None:
            why = "rope_scaling needs a factor above 0"
            raise refuse(where, "rope_scaling_factor", factor, why)
        return {"factor": factor, **LLAMA3}
    if factor is not None and factor != LLAMA3_FACTOR:
        why = f"models of Megatron-LM are scaled by {LLAMA3_FACTOR:g} whatever it says"
        raise refuse(where, "rope_scaling_factor", factor, why)
    return {"factor": LLAMA3_FACTOR, **LLAMA3}


def _old_llama3(old: Mapping[str, float], where: str) -> dict[str, Any]:
    if absent := [name for name in _OLD_BRIDGE if name not in old]:
        raise ConfigError(f"{where}: {', '.join(old)} need {', '.join(absent)}, a number above 0")
    if old["high_freq_factor"] <= old["low_freq_factor"]:
        why = f"needs more than low_freq_factor={old['low_freq_factor']:g}"
        raise refuse(where, "high_freq_factor", old["high_freq_factor"], why)
    return {
        "factor": old["scale_factor"],
        "low_freq_factor": old["low_freq_factor"],
        "high_freq_factor": old["high_freq_factor"],
        "original_max_position_embeddings": int(old["old_context_len"]),
    }


def _yarn(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    def value(name: str, default: float) -> float:
        found = number(args, (name,), where, above=0)
        if found is None and bridge and name.startswith("yarn_"):
            raise refuse(where, name, None, "position_embedding_type=yarn needs a number")
        return default if found is None else found

    # Bridge has every parameter under a name of its own, and hands None on as it is.
    bridge = of_bridge(args)
    factor = value("yarn_rotary_scaling_factor" if bridge else "rotary_scaling_factor", 1.0)
    beta_fast, beta_slow = value("yarn_beta_fast", 32.0), value("yarn_beta_slow", 1.0)
    original = value("yarn_original_max_position_embeddings", 4096)
    rounds = args.get("yarn_correction_range_round_to_int")
    return {
        "scaling": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(original),
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "truncate": bool(rounds) if bridge or rounds is not None else True,
        "attention_factor": _concentration(args, factor, bridge, where),
    }


def _concentration(args: Mapping[str, Any], factor: float, bridge: bool, where: str) -> float:
    names = ("yarn_mscale", "yarn_mscale_all_dim") if bridge else ("mscale", "mscale_all_dim")
    mscale, all_dim = (number(args, (name,), where) for name in names)
    if not bridge:
        mscale, all_dim = 1.0 if mscale is None else mscale, all_dim or 0.0

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale is None or all_dim is None:
        return scale(1.0)
    if not scale(all_dim):
        raise refuse(where, names[1], all_dim, "it makes yarn divide by 0")
    return scale(mscale) / scale(all_dim)


def no_rope_layers(
    args: Mapping[str, Any], num_layers: int, rope: Mapping[str, Any] | None, where: str
) -> list[int]:
    """Numbers of the layers that do not rotate, counted from 0.

    Raises:
        ConfigError: the setting does not fit the layers, or the kind of positions.
    """
    setting: Any = args.get("no_rope_freq")
    if is_empty(setting) or rope is None:
        return []
    if isinstance(setting, int):
        if setting < 0 or num_layers % setting:
            why = f"needs a divisor of {num_layers} layers"
            raise refuse(where, "no_rope_freq", setting, why)
        flags = ([0] * (setting - 1) + [1]) * (num_layers // setting)
    elif isinstance(setting, (list, tuple)) and len(setting) == num_layers:
        flags = list(setting)
    else:
        why = f"needs one number per layer, {num_layers}"
        raise refuse(where, "no_rope_freq", setting, why)
    if any(flags) and rope.get("scaling") == "yarn":
        raise refuse(where, "no_rope_freq", setting, "not with yarn")
    return [layer for layer, flag in enumerate(flags) if flag]
