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

from collections.abc import Iterator
from dataclasses import dataclass

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
    "copy_part",
    "local_shapes",
    "num_parameters",
    "num_query_groups",
    "padded_vocab_size",
    "rank_part",
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


@dataclass(frozen=True, slots=True)
class RankPart:
    """Ranges of a canonical tensor along `dim` that one TP rank holds, one after the other, and
    rows of zeros after them."""

    dim: int
    ranges: tuple[range, ...]
    padding: int = 0

    def windows(self, target: Tensor) -> Iterator[tuple[Tensor, range]]:
        """Windows of the rank's tensor with the range that each is to be filled with; the rows of
        padding are set to zero."""
        done = 0
        for wanted in self.ranges:
            yield target.narrow(self.dim, done, len(wanted)), wanted
            done += len(wanted)
        target.narrow(self.dim, done, self.padding).zero_()


def shard(name: str, tensor: Tensor, config: ModelConfig, *, tp_rank: int, tp: int) -> Tensor:
    """Slice of canonical `tensor` that TP rank `tp_rank` holds; a view if possible."""
    part = rank_part(name, config, tp_rank=tp_rank, tp=tp)
    if part is None:
        return tensor
    cut = [tensor.narrow(part.dim, piece.start, len(piece)) for piece in part.ranges]
    if part.padding:
        cut.append(tensor.new_zeros(part.padding, *tensor.shape[1:]))
    return cut[0] if len(cut) == 1 else torch.cat(cut, part.dim)


def copy_part(target: Tensor, tensor: Tensor, part: RankPart | None) -> None:
    """Copy a rank's part of canonical `tensor` to `target`, of any dtype and device."""
    if part is None:
        target.copy_(tensor)
        return
    for window, piece in part.windows(target):
        window.copy_(tensor.narrow(part.dim, piece.start, len(piece)))


def rank_part(name: str, config: ModelConfig, *, tp_rank: int, tp: int) -> RankPart | None:
    """Part of a canonical tensor on TP rank `tp_rank`; None if it is the whole tensor."""
    _, part = split_layer(name)
    if name in VOCAB_NAMES:
        rows = padded_vocab_size(config.vocab_size, tp) // tp
        mine = range(tp_rank * rows, (tp_rank + 1) * rows)
        real = range(min(mine.start, config.vocab_size), min(mine.stop, config.vocab_size))
        return RankPart(0, (real,), rows - len(real))
    if tp == 1 or shard_dim(name) is None:
        return None
    if part.startswith("self_attention.linear_qkv."):
        return RankPart(0, _query_group_rows(config, tp_rank, tp))
    if part.startswith("mlp.linear_fc1."):
        halves = (0, config.ffn_hidden_size) if config.gated else (0,)
        return RankPart(
            0, tuple(_share(config.ffn_hidden_size, tp_rank, tp, first) for first in halves)
        )
    columns = (
        config.num_heads * config.head_dim
        if part == "self_attention.linear_proj.weight"
        else config.ffn_hidden_size
    )
    return RankPart(1, (_share(columns, tp_rank, tp, 0),))


def _share(size: int, rank: int, ranks: int, first: int) -> range:
    return range(first + size * rank // ranks, first + size * (rank + 1) // ranks)


def _local_shape(name: str, shape: Shape, config: ModelConfig, tp: int) -> Shape:
    _, part = split_layer(name)
    if name in VOCAB_NAMES:
        return (padded_vocab_size(config.vocab_size, tp) // tp, *shape[1:])
    if part.startswith("self_attention.linear_qkv."):
        heads = config.num_heads + 2 * num_query_groups(config, tp)
        return (heads * config.head_dim // tp, *shape[1:])
    dim = shard_dim(name)
    return tuple(size // tp if i == dim else size for i, size in enumerate(shape))


def _query_group_rows(config: ModelConfig, tp_rank: int, tp: int) -> tuple[range, ...]:
    kv = config.num_kv_heads
    q_rows = config.num_heads // kv * config.head_dim
    rows = q_rows + 2 * config.head_dim
    if kv >= tp:
        return (_share(kv * rows, tp_rank, tp, 0),)
    # Ranks that hold the same KV head, each with its own part of the query heads.
    sharers = tp // kv
    first = tp_rank // sharers * rows
    q = _share(q_rows, tp_rank % sharers, sharers, first)
    return (q, range(first + q_rows, first + rows))
