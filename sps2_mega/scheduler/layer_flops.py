"""FLOPs of one layer for some tokens of a prompt: pure counts from ModelConfig, no seconds."""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.attention.layout.causal_pairs import causal_pairs
from sps2_mega.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFlops:
    """FLOPs of one layer on all ranks together.

    `token_flops` are spent on each token in projections and feed-forward layers, `pair_flops` on
    each key that a query sees, over all heads.
    """

    num_layers: int
    token_flops: int
    pair_flops: int

    @classmethod
    def of(cls, model: ModelConfig) -> LayerFlops:
        """FLOP counts of a model."""
        heads = 2 * model.num_heads + 2 * model.num_kv_heads
        params = model.hidden_size * heads * model.head_dim
        params += (3 if model.gated else 2) * model.hidden_size * model.ffn_hidden_size
        return cls(
            num_layers=model.num_layers,
            token_flops=2 * params,
            pair_flops=4 * model.num_heads * model.head_dim,
        )

    def flops(self, start: int, end: int) -> int:
        """FLOPs of tokens [start, end) of a prompt, each of which sees all tokens up to itself.

        Sparse attention does less; how much less is left to measurements.
        """
        pairs = causal_pairs(range(start, end))
        return (end - start) * self.token_flops + pairs * self.pair_flops
