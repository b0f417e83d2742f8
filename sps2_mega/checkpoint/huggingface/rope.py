"""Rotary embedding fields of a Hugging Face config.json <-> RopeConfig.

Old files have `rope_theta` and `rope_scaling` ({"type" or "rope_type": ..}); new ones
`rope_parameters`. Types whose frequencies depend on the length of the input (dynamic, longrope) are
refused: they would make keys in the cache depend on later tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sps2_mega.config import RopeConfig
from sps2_mega.errors import ConfigError

_DEFAULT_THETA = 10000.0
_FIELDS = {
    # rope type -> (required fields, optional fields)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
_ALWAYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_NOT_FLOAT = ("original_max_position_embeddings", "truncate")


def rope_from_hf(hf: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Convert the rotary fields of a config.json.

    Raises:
        ConfigError: the type is not supported, or a field is absent or unknown.
    """
    # As transformers 5 does: a `rope_scaling` replaces all of `rope_parameters`, theta included.
    where = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = dict(hf.get(where) or {})
    from sps2_mega.checkpoint.huggingface.fields import check_rope

    check_rope(given, where)
    theta = given.get("rope_theta", hf.get("rope_theta", _DEFAULT_THETA))
    if theta is None:  # transformers has no default for a null
        place = f"{where}: " if "rope_theta" in given else ""
        raise ConfigError(f"{place}rope_theta=None: a number is needed, or no such field")
    rotated = given.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
    if rotated != 1.0:
        place = f"{where}: " if "partial_rotary_factor" in given else ""
        raise ConfigError(f"{place}partial_rotary_factor={rotated} is not supported (needs 1.0)")
    rope_type: Any = given.get("rope_type", given.get("type", "default"))
    if rope_type not in _FIELDS:
        known = ", ".join(_FIELDS)
        raise ConfigError(f"{where}: rope_type={rope_type!r} is not supported (known: {known})")
    required, optional = _FIELDS[rope_type]
    fields = {k: v for k, v in given.items() if v is not None and k not in _ALWAYS}
    if absent := [name for name in required if name not in fields]:
        raise ConfigError(f"{where}: rope_type={rope_type!r} needs {', '.join(absent)}")
    if rope_type == "default":
        return RopeConfig(theta=float(theta))  # stray fields beside the default type have no effect
    for name in ("beta_fast", "beta_slow"):
        if not fields.get(name):  # transformers takes its default in place of zero
            fields.pop(name, None)
    if "truncate" in given:  # and a null for false
        fields["truncate"] = bool(given["truncate"])
    if rope_type == "llama3" and fields["high_freq_factor"] <= fields["low_freq_factor"]:
        raise ConfigError(
            f"{where}: high_freq_factor={fields['high_freq_factor']} must be above "
            f"low_freq_factor={fields['low_freq_factor']}"
        )
    if unknown := [name for name in fields if name not in required + optional]:
        shown = ", ".join(f"{name}={fields[name]!r}" for name in unknown)
        raise ConfigError(
            f"{where}: rope_type={rope_type!r} has fields that are not understood: {shown}"
        )
    if "original_max_position_embeddings" in optional:
        # The top-level field comes first, and a null is no absent field to transformers.
        length = given.get("original_max_position_embeddings", max_position_embeddings)
        length = hf.get("original_max_position_embeddings", length)
        if length is None:
            raise ConfigError(
                f"original_max_position_embeddings=None: {where} with rope_type={rope_type!r} "
                "needs a number, or no such field"
            )
        fields["original_max_position_embeddings"] = int(length)
    values: dict[str, Any] = {
        name: value if name in _NOT_FLOAT else float(value) for name, value in fields.items()
    }
    return RopeConfig(theta=float(theta), scaling=rope_type, **values)


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """Write both spellings, so that transformers before and after version 5 read the same."""
    if rope.scaling == "none":
        return {
            "rope_theta": rope.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
        }
    required, optional = _FIELDS[rope.scaling]
    fields = {name: getattr(rope, name) for name in required + optional}
    scaling = {"rope_type": rope.scaling} | {k: v for k, v in fields.items() if v is not None}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": rope.theta},
    }
