"""Least operations and bytes of a prefill and of a decode step, from a ModelConfig."""

from __future__ import annotations

from collections.abc import Sequence

from sps2_mega.attention.layout.causal_pairs import causal_pairs
from sps2_mega.checkpoint.canonical import num_parameters
from sps2_mega.config import ModelConfig


def linear_flops(model: ModelConfig, tokens: int) -> float:
    """FLOPs of the layers' products for `tokens` tokens and of the output head for one."""
    vocabulary = model.vocab_size * model.hidden_size
    layers = num_parameters(model) - vocabulary * (1 if model.tie_embeddings else 2)
    return 2.0 * layers * tokens + 2.0 * vocabulary


def attention_flops(model: ModelConfig, tokens: int) -> float:
    """FLOPs of exact causal attention over a whole prompt: both products, visible pairs only."""
    pairs = causal_pairs(range(tokens))
    return 4.0 * model.head_dim * model.num_heads * pairs * model.num_layers


def decode_bytes(model: ModelConfig, contexts: Sequence[int], itemsize: int) -> float:
    """Bytes that one step reads: every used weight once, and the keys and values of all sequences.

    The embedding's unused rows are not read.
    """
    weights = num_parameters(model)
    if not model.tie_embeddings:
        weights -= model.vocab_size * model.hidden_size
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return float(itemsize) * (weights + per_token * sum(contexts))


def spread(count: int, shortest: int, longest: int) -> list[int]:
    """`count` lengths from `shortest` to `longest`, in geometric progression."""
    ratio = longest / shortest
    return [round(shortest * ratio ** (i / max(1, count - 1))) for i in range(count)]
