"""Attention of a chunk of one prompt over keys that are all here, in order of position.

    keys     0 ............ known ......... end      keys of earlier chunks, then keys of this one
    queries                 [ r0 ][ r1 ][ r0 ]       runs of this rank and of others

Exact, or by a CSA pattern. Partials go into a running sum, so the earlier keys can be computed on
while the chunk's own keys are in flight. `attention.chunked` decides what travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sps2_mega.attention.csa.key_blocks import BlockPiece, CSAPiece
from sps2_mega.attention.csa.pieces import csa_pieces, join_queries
from sps2_mega.kernels.attention.sdpa import attend_dense, attend_run
from sps2_mega.kernels.csa.dispatch import attend_pieces
from sps2_mega.kernels.csa.piece import Piece

if TYPE_CHECKING:
    from sps2_mega.attention.csa.pattern import CSAPattern
    from sps2_mega.attention.layout.token_layout import Run
    from sps2_mega.attention.transports.base import SoftmaxParams
    from sps2_mega.attention.transports.partials import PartialSum


class ChunkScores(Protocol):
    """Keys that queries of a chunk see."""

    def add_partials(
        self,
        total: PartialSum,
        runs: Sequence[Run],
        q_TNH: Tensor,
        keys: range,
        kv_SKH: tuple[Tensor, Tensor],
        layer: int,
        softmax: SoftmaxParams,
    ) -> None:
        """Add the partials of this rank's queries over what they see of some keys.

        Args:
            total: Running sum over the rows of `q_TNH`.
            runs: Runs of the queries, with rows of `q_TNH` as local numbers.
            q_TNH: Queries of this rank in the chunk.
            keys: Positions of the keys to look at.
            kv_SKH: Keys and values of the prompt; row s is position s.
            layer: Number of the layer, from 0.
            softmax: Scale and sliding window of the layer.
        """
        ...


class ExactChunks:
    """Every query sees all keys up to itself, or the ones in its window."""

    def add_partials(
        self,
        total: PartialSum,
        runs: Sequence[Run],
        q_TNH: Tensor,
        keys: range,
        kv_SKH: tuple[Tensor, Tensor],
        layer: int,
        softmax: SoftmaxParams,
    ) -> None:
        """See `ChunkScores.add_partials` for arguments, shapes and units."""
        if runs and softmax.window is None and keys.stop <= runs[0].start:
            # All queries see these keys, whatever their positions: one call for all runs.
            k, v = (x[keys.start : keys.stop] for x in kv_SKH)
            total.add(*_attend_all(q_TNH, k, v, softmax.scale))
            return
        for run in runs:
            first = keys.start
            if softmax.window is not None:
                first = max(first, run.start - softmax.window + 1)
            k, v = (x[first : min(run.end, keys.stop)] for x in kv_SKH)
            partial = attend_run(
                q_TNH[run.local],
                k,
                v,
                scale=softmax.scale,
                q_start=run.start,
                k_start=first,
                window=softmax.window,
            )
            total.add(*partial, rows=run.local)


class SparseChunks:
    """Queries see what the pattern shows; `kv_heads` of this TP rank are numbered over all."""

    def __init__(self, pattern: CSAPattern, prompt_len: int, kv_heads: range) -> None:
        self._pattern, self._prompt_len, self._kv_heads = pattern, prompt_len, kv_heads

    def add_partials(
        self,
        total: PartialSum,
        runs: Sequence[Run],
        q_TNH: Tensor,
        keys: range,
        kv_SKH: tuple[Tensor, Tensor],
        layer: int,
        softmax: SoftmaxParams,
    ) -> None:
        """See `ChunkScores.add_partials` for arguments, shapes and units."""
        found: list[CSAPiece] = []
        for run in runs:
            pieces = csa_pieces(
                self._pattern,
                prompt_len=self._prompt_len,
                queries=range(run.start, run.end),
                keys=range(keys.start, min(keys.stop, run.end)),
                kv_heads=self._kv_heads,
                layer=layer,
            )
            by = run.local_start - run.start
            found += [replace(piece, queries=_shift(piece.queries, by)) for piece in pieces]
        # Runs are neighbours among the local rows, and mostly see the same far keys.
        joined = join_queries(found)
        plain = [piece for piece in joined if isinstance(piece, Piece)]
        if plain:
            k, v = kv_SKH
            total.add(*attend_pieces(q_TNH, k, v, plain, scale=softmax.scale))
        for piece in joined:
            if isinstance(piece, BlockPiece):
                rows = torch.cat([torch.arange(r.start, r.stop) for r in piece.keys.ranges()])
                k, v = (x.index_select(0, rows.to(x.device)) for x in kv_SKH)
                dense = [Piece(piece.queries, range(len(rows)), piece.kv_heads)]
                total.add(*attend_pieces(q_TNH, k, v, dense, scale=softmax.scale))


def _attend_all(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend without a mask -> (out [T, N, H], lse [T, N]), never repeating keys and values.

    Without a mask the query heads of a KV head are just more rows.
    """
    tokens, heads, width = q_TNH.shape
    kv_heads = k_SKH.shape[1]
    repeats = heads // kv_heads
    if repeats == 1:
        return attend_dense(q_TNH, k_SKH, v_SKH, scale=scale, causal=False)
    rows = q_TNH.unflatten(1, (kv_heads, repeats)).transpose(1, 2).reshape(-1, kv_heads, width)
    out, lse = attend_dense(rows, k_SKH, v_SKH, scale=scale, causal=False)
    out_TNH = out.reshape(tokens, repeats, kv_heads, width).transpose(1, 2).reshape(q_TNH.shape)
    lse_TN = lse.reshape(tokens, repeats, kv_heads).transpose(1, 2).reshape(tokens, heads)
    return out_TNH, lse_TN


def _shift(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by, numbers.step)
