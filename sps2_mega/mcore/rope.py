"""Rotary embedding: inverse frequencies per scaling rule, and angles of token positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sps2_mega.attention.step import Rotation
from sps2_mega.config import ModelConfig, RopeConfig
from sps2_mega.errors import ConfigError


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_positions: int) -> Tensor:
    """Inverse frequencies [rotary_dim / 2], float32 on CPU; by default all of a head rotates."""
    head_dim = rope.rotary_dim or head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = 1.0 / rope.theta**exponents
    if rope.scaling == "none":
        return base
    if rope.scaling == "linear":
        return base / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, base)
    return _yarn(rope, base, head_dim, max_positions)


def attention_factor(rope: RopeConfig | None) -> float:
    """YaRN's factor of cos and sin, whose square scales the scores; 1 for all other rules."""
    if rope is None or rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def rotates_whole_heads(model: ModelConfig) -> bool:
    """Whether all elements of a head rotate, paired as halves, in every layer."""
    if model.rope is None or model.rope.interleaved or model.no_rope_layers:
        return False
    return model.rope.rotary_dim in (None, model.head_dim)


def angles(positions_T: Tensor, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotation angles [T, 1, 1, rotary_dim] for Megatron's layers, float32.

    Each is there twice, for both elements of a pair: halves, or neighbours if `interleaved`.
    """
    angles_TR = positions_T.float()[:, None] * inv_freq
    if interleaved:
        return angles_TR.repeat_interleave(2, -1)[:, None, None, :]
    return torch.cat((angles_TR, angles_TR), -1)[:, None, None, :]


def rotation(positions_T: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> Rotation:
    """Cos and sin [T, head_dim / 2] for rotation outside Megatron's layers, in the heads' type."""
    angles_TR = positions_T.float()[:, None] * inv_freq
    return Rotation(angles_TR.cos().to(dtype), angles_TR.sin().to(dtype))


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(rope: RopeConfig, base: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth blend between."""
    context = _original_context(rope)
    wavelength = 2 * math.pi / base
    blend = (context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)
    return base / rope.factor * (1 - blend) + base * blend


def _yarn(rope: RopeConfig, base: Tensor, head_dim: int, max_positions: int) -> Tensor:
    """YaRN, "NTK-by-parts" (arXiv 2309.00071, section 3.2).

    Dimensions that turn fewer than `beta_slow` times over the original context are interpolated,
    those above `beta_fast` kept, with a ramp between.
    """
    context = rope.original_max_position_embeddings or max_positions

    def dimension(rotations: float) -> float:
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    if low == high:
        high += 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0.0, 1.0)
    return base / rope.factor * (1 - keep) + base * keep


def _original_context(rope: RopeConfig) -> int:
    if rope.original_max_position_embeddings is None:
        raise ConfigError(f"rope scaling {rope.scaling!r} needs original_max_position_embeddings")
    return rope.original_max_position_embeddings
