"""Sizes of a model: parameters of one layer, bytes of weights and of cached tokens. Pure counts.

Norms and biases are left out: they are below a thousandth of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.config import ModelConfig
from sps2_mega.scheduler.layer_flops import LayerFlops

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Parameters of one layer, and bytes of a number.

    `itemsize` is that of activations, cache and attention weights, `ffn_itemsize` that of
    feed-forward weights (1 where they are kept in FP8).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    attention_params: int
    ffn_params: int
    itemsize: int
    ffn_itemsize: int

    @property
    def layer_flops(self) -> LayerFlops:
        """FLOPs of one layer, as the scheduler counts them."""
        return LayerFlops(
            num_layers=self.num_layers,
            token_flops=2 * self.layer_params,
            pair_flops=4 * self.num_heads * self.head_dim,
        )

    @property
    def layer_params(self) -> int:
        return self.attention_params + self.ffn_params

    @property
    def layer_bytes(self) -> int:
        return self.attention_params * self.itemsize + self.ffn_params * self.ffn_itemsize

    @property
    def head_params(self) -> int:
        """Parameters of the output projection to the vocabulary."""
        return self.vocab_size * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all layers and of the tables of input and output.

        Some models share the two tables; they are small either way.
        """
        return self.num_layers * self.layer_bytes + 2 * self.head_params * self.itemsize

    def kv_bytes(self, tp: int) -> int:
        """Bytes of one token's keys and values in one layer on one of `tp` ranks.

        A KV head is never cut.
        """
        return 2 * max(1, self.num_kv_heads // tp) * self.head_dim * self.itemsize


def model_size(model: ModelConfig, *, ffn_itemsize: int | None = None) -> ModelSize:
    """Count a model; `ffn_itemsize` where feed-forward weights have another width."""
    itemsize = _ITEMSIZE[model.dtype]
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return ModelSize(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        attention_params=model.hidden_size * (2 * queries + 2 * keys),
        ffn_params=(3 if model.gated else 2) * model.hidden_size * model.ffn_hidden_size,
        itemsize=itemsize,
        ffn_itemsize=itemsize if ffn_itemsize is None else ffn_itemsize,
    )
