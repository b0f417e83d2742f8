"""Architecture of a model: what it computes, independent of files, ranks and the engine.

`sps2_mega.config` has these names too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sps2_mega.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    `scaling` selects how inverse frequencies follow from `theta`: `none`, `linear` (positions /
    factor), `llama3` (Llama 3.1's smoothed bands) or `yarn` (arXiv 2309.00071). The first
    `rotary_dim` elements of a head rotate, None: all. Pairs are halves of these elements, or with
    `interleaved` neighbours.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    rotary_dim: int | None = None
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only model, independent of file format and ranks.

    `vocab_size` is the true vocabulary (logits are cut to it); padding for TP is decided where
    weights are sharded. `rope=None` means learned absolute positions. `sliding_window=w`: a query
    sees itself and the w-1 tokens before it. Layers in `no_rope_layers` (from 0) do not rotate.

    `activation` with `_gated` is `act(clamp(gate)) * (clamp(up) + glu_linear_offset)`: the clamp
    bounds the gate from above, and up on both sides. `qk_l2_norm` divides queries and keys by
    their root mean square. `softmax_scale=None` is one over the root of head_dim.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    activation: Literal[
        "silu_gated",
        "gelu",
        "gelu_tanh",
        "gelu_gated",
        "gelu_tanh_gated",
        "quick_gelu",
        "quick_gelu_gated",
        "relu",
        "relu_gated",
        "silu",
        "squared_relu",
        "squared_relu_gated",
    ] = "silu_gated"
    activation_clamp: float | None = None
    glu_linear_offset: float = 0.0
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    qk_l2_norm: bool = False
    tie_embeddings: bool = False
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    no_rope_layers: tuple[int, ...] = ()
    softmax_scale: float | None = None
    sliding_window: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        rotary_dim = None if self.rope is None else self.rope.rotary_dim
        if rotary_dim is not None and not (0 < rotary_dim <= self.head_dim and rotary_dim % 2 == 0):
            raise ConfigError(
                f"rope.rotary_dim must be an even number up to head_dim ({self.head_dim}), "
                f"got {rotary_dim}"
            )
        yarn = self.rope is not None and self.rope.scaling == "yarn"
        if yarn and (rotary_dim not in (None, self.head_dim) or self.no_rope_layers):
            raise ConfigError("rope scaling 'yarn' needs whole heads that rotate in every layer")
        if self.qk_norm and self.qk_l2_norm:
            raise ConfigError("qk_norm and qk_l2_norm exclude each other")

    @property
    def gated(self) -> bool:
        return self.activation.endswith("_gated")
