"""Part of a canonical tensor on one tensor-parallel rank: ints and slices, no process group.

    linear_qkv            by query groups (a KV head with its query heads stays together)
    linear_fc1            gate rows and up rows are each cut, so a rank holds [its gate; its up]
    linear_proj, fc2      by columns, their bias on every rank
    embeddings, output    by rows, after zero rows up to a multiple of 128 * tp
    norms, positions      on every rank

With fewer KV heads than TP ranks, tp / num_kv_heads ranks hold each KV head:
the model is then built with `num_query_groups(config, tp)` = tp groups, and
group g has KV head g * num_kv_heads // tp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sps2_mega.checkpoint.canonical import (
    VOCAB_NAMES,
    Shape,
    canonical_shapes,
    num_parameters,
    split_layer,
)
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError

__all__ = [
    "canonical_shapes",
    "check_tp",
    "local_shapes",
    "num_parameters",
    "num_query_groups",
    "padded_vocab_size",
    "shard",
    "shard_dim",
]

VOCAB_MULTIPLE = 128


def check_tp(config: ModelConfig, tp: int) -> None:
    """Check that a model can be cut into `tp` tensor-parallel ranks.

    Raises:
        ConfigError: it cannot.
    """
    if tp < 1:
        raise ConfigError(f"tp must be >= 1, got {tp}")
    for name in ("num_heads", "ffn_hidden_size"):
        if getattr(config, name) % tp:
            raise ConfigError(f"{name} ({getattr(config, name)}) is not divisible by tp ({tp})")
    kv = config.num_kv_heads
    if kv % tp and tp % kv:
        raise ConfigError(f"num_kv_heads ({kv}) must be a multiple or a divisor of tp ({tp})")


def num_query_groups(config: ModelConfig, tp: int) -> int:
    """Number of query groups the model is built with over all TP ranks: at least one per rank."""
    check_tp(config, tp)
    return max(config.num_kv_heads, tp)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding and output matrices over all TP ranks, by Megatron's rule."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def shard_dim(name: str) -> int | None:
    """Dimension along which TP cuts a tensor; None if every rank has all of it."""
    _, part = split_layer(name)
    if name in VOCAB_NAMES or part.startswith(("self_attention.linear_qkv.", "mlp.linear_fc1.")):
        return 0
    return 1 if part in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight") else None


def local_shapes(config: ModelConfig, tp: int) -> dict[str, Shape]:
    """Name -> shape of every weight on one TP rank (the same on each)."""
    check_tp(config, tp)
    return {
        name: _local_shape(name, shape, config, tp)
        for name, shape in canonical_shapes(config).items()
    }


def shard(name: str, tensor: Tensor, config: ModelConfig, *, tp_rank: int, tp: int) -> Tensor:
    """Slice of canonical `tensor` that TP rank `tp_rank` holds; a view if possible."""
    _, part = split_layer(name)
    if name in VOCAB_NAMES:
        return _vocab_rows(tensor, config.vocab_size, tp_rank, tp)
    if tp == 1:
        return tensor
    if part.startswith("self_attention.linear_qkv."):
        return _query_groups(tensor, config, tp_rank, tp)
    if part.startswith("mlp.linear_fc1."):
        halves = tensor.chunk(2, 0) if config.gated else (tensor,)
        pieces = [half.chunk(tp, 0)[tp_rank] for half in halves]
        return torch.cat(pieces) if config.gated else pieces[0]
    return tensor if shard_dim(name) is None else tensor.chunk(tp, 1)[tp_rank]


def _local_shape(name: str, shape: Shape, config: ModelConfig, tp: int) -> Shape:
    _, part = split_layer(name)
    if name in VOCAB_NAMES:
        return (padded_vocab_size(config.vocab_size, tp) // tp, *shape[1:])
    if part.startswith("self_attention.linear_qkv."):
        heads = config.num_heads + 2 * num_query_groups(config, tp)
        return (heads * config.head_dim // tp, *shape[1:])
    dim = shard_dim(name)
    return tuple(size // tp if i == dim else size for i, size in enumerate(shape))


def _vocab_rows(tensor: Tensor, vocab_size: int, tp_rank: int, tp: int) -> Tensor:
    rows = padded_vocab_size(vocab_size, tp) // tp
    mine = tensor[tp_rank * rows : (tp_rank + 1) * rows]
    if len(mine) == rows:
        return mine
    padding = tensor.new_zeros(rows - len(mine), *tensor.shape[1:])
    return torch.cat((mine, padding))


def _query_groups(tensor: Tensor, config: ModelConfig, tp_rank: int, tp: int) -> Tensor:
    kv, rest = config.num_kv_heads, tensor.shape[1:]
    per_group = config.num_heads // kv
    groups = tensor.reshape(kv, (per_group + 2) * config.head_dim, *rest)
    if kv >= tp:
        return groups.chunk(tp, 0)[tp_rank].reshape(-1, *rest)
    # Ranks that hold the same KV head, each with its own part of the query heads.
    sharers = tp // kv
    group = groups[tp_rank // sharers]
    q_rows = per_group * config.head_dim
    q = group[:q_rows].chunk(sharers, 0)[tp_rank % sharers]
    return torch.cat((q, group[q_rows:]))
