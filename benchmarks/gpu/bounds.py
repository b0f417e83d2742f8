"""What a prefill and a decode step must at least do, in operations and bytes: pure arithmetic on a
ModelConfig."""

from __future__ import annotations

from collections.abc import Sequence

from sps2_mega.checkpoint.canonical import num_parameters
from sps2_mega.config import ModelConfig


def linear_flops(model: ModelConfig, tokens: int) -> float:
    """Products of the layers for `tokens` tokens and of the output head for one."""
    vocabulary = model.vocab_size * model.hidden_size
    layers = num_parameters(model) - vocabulary * (1 if model.tie_embeddings else 2)
    return 2.0 * layers * tokens + 2.0 * vocabulary


def attention_flops(model: ModelConfig, tokens: int) -> float:
    """Exact causal attention of a whole prompt: both products, visible pairs only."""
    pairs = tokens * (tokens + 1) // 2
    return 4.0 * model.head_dim * model.num_heads * pairs * model.num_layers


def decode_bytes(model: ModelConfig, contexts: Sequence[int], itemsize: int) -> float:
    """Bytes that one step reads: every weight but the embedding's unused rows once, and the
    sequences' keys and values."""
    weights = num_parameters(model)
    if not model.tie_embeddings:
        weights -= model.vocab_size * model.hidden_size
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return float(itemsize) * (weights + per_token * sum(contexts))


def spread(count: int, shortest: int, longest: int) -> list[int]:
    """`count` lengths from `shortest` to `longest`, each by the same factor longer."""
    ratio = longest / shortest
    return [round(shortest * ratio ** (i / max(1, count - 1))) for i in range(count)]
