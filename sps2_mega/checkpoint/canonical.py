"""Canonical form of a model's weights: the names and global shapes of its tensors.

Names are those of megatron-core's GPTModel built from its local layer spec; tensors
are whole (no TP, no PP) and vocabulary rows are not padded. Every file format is
translated to this form and back. `sharding` cuts a tensor for one TP rank; each
format's module knows the spelling in its files.

    decoder.layers.{i}.self_attention.linear_qkv.weight
        [kv heads * (q per kv + 2) * head_dim, hidden]
        rows: for each KV head its query heads, then its key, then its value
    decoder.layers.{i}.mlp.linear_fc1.weight
        [2 * ffn, hidden] = gate above up (gated)
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from sps2_mega.config import ModelConfig

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
VOCAB_NAMES = (WORD_EMBEDDINGS, OUTPUT_LAYER)
"""Tensors with one row per vocabulary entry: the only ones that a file may pad."""

Shape = tuple[int, ...]


def canonical_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> global shape of every weight of the model, in the order of a forward pass."""
    shapes: dict[str, Shape] = {WORD_EMBEDDINGS: (config.vocab_size, config.hidden_size)}
    if config.rope is None:
        shapes[POSITION_EMBEDDINGS] = (config.max_position_embeddings, config.hidden_size)
    layer = dict(layer_shapes(config))
    for index in range(config.num_layers):
        shapes |= {f"decoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= dict(_norm("decoder.final_layernorm", config.hidden_size, config))
    if not config.tie_embeddings:
        shapes[OUTPUT_LAYER] = (config.vocab_size, config.hidden_size)
    return shapes


def layer_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Names, without the prefix `decoder.layers.{i}.`, and shapes of one layer's weights."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    heads = config.num_heads * config.head_dim
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    fc1 = 2 * ffn if config.gated else ffn

    yield from _norm("input_layernorm", hidden, config)
    yield "self_attention.linear_qkv.weight", (qkv, hidden)
    if config.qkv_bias or config.linear_bias:
        yield "self_attention.linear_qkv.bias", (qkv,)
    if config.qk_norm:
        yield from _norm("self_attention.q_layernorm", config.head_dim, config)
        yield from _norm("self_attention.k_layernorm", config.head_dim, config)
    yield "self_attention.linear_proj.weight", (hidden, heads)
    if config.linear_bias:
        yield "self_attention.linear_proj.bias", (hidden,)
    yield from _norm("pre_mlp_layernorm", hidden, config)
    yield "mlp.linear_fc1.weight", (fc1, hidden)
    if config.linear_bias:
        yield "mlp.linear_fc1.bias", (fc1,)
    yield "mlp.linear_fc2.weight", (hidden, ffn)
    if config.linear_bias:
        yield "mlp.linear_fc2.bias", (hidden,)


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters as published: true vocabulary, tied embeddings once."""
    return sum(prod(shape) for shape in canonical_shapes(config).values())


def split_layer(name: str) -> tuple[int | None, str]:
    """Split a name into layer and rest; names outside the layers give (None, name).

    `decoder.layers.3.mlp.linear_fc1.weight` -> (3, `mlp.linear_fc1.weight`).
    """
    prefix = "decoder.layers."
    if name.startswith(prefix):
        index, _, rest = name.removeprefix(prefix).partition(".")
        if index.isdecimal() and rest:
            return int(index), rest
    return None, name


def _norm(name: str, size: int, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    if config.norm == "layernorm":
        yield f"{name}.bias", (size,)
