"""Attention of a chunk of one prompt over keys that are all here, in order of position: exact, or
by a CSA pattern.

    keys     0 ............ known ......... end      `earlier`: those that previous chunks brought
    queries                 [ r0 ][ r1 ][ r0 ]       `own`: those that came with the chunk

Both add partials to a float32 sum, so the first can run while the keys of the second are on their
way. Decides nothing about what travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from sps2_mega.attention.csa.key_blocks import BlockPiece, CSAPiece
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces, join_queries
from sps2_mega.attention.layout.token_layout import Run
from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.kernels.attention.sdpa import attend, attend_run
from sps2_mega.kernels.csa.dispatch import attend_pieces
from sps2_mega.kernels.csa.piece import Piece

# Of (rows, out [T, N, H], lse [T, N]): adds a partial of some of the chunk's local queries.
Add = Callable[[slice, Tensor, Tensor], None]


class ChunkScores(Protocol):
    def attend(
        self,
        runs: Sequence[Run],
        q_TNH: Tensor,
        keys: range,
        kv_SKH: tuple[Tensor, Tensor],
        layer: int,
        rule: SoftmaxParams,
        add: Add,
    ) -> None:
        """Adds the partials of this rank's queries, which are `runs`, over what they see of the
        positions `keys`. Row s of `kv_SKH` is position s."""
        ...


class ExactChunks:
    """Every query sees all keys up to itself, or those in its window."""

    def attend(
        self,
        runs: Sequence[Run],
        q_TNH: Tensor,
        keys: range,
        kv_SKH: tuple[Tensor, Tensor],
        layer: int,
        rule: SoftmaxParams,
        add: Add,
    ) -> None:
        if runs and rule.window is None and keys.stop <= runs[0].start:
            # Keys that all queries see, whatever their positions: one call for all runs.
            k, v = (x[keys.start : keys.stop] for x in kv_SKH)
            add(slice(0, len(q_TNH)), *_attend_all(q_TNH, k, v, rule.scale))
            return
        for run in runs:
            first = keys.start
            if rule.window is not None:
                first = max(first, run.start - rule.window + 1)
            k, v = (x[first : min(run.end, keys.stop)] for x in kv_SKH)
            partial = attend_run(
                q_TNH[run.local],
                k,
                v,
                scale=rule.scale,
                q_start=run.start,
                k_start=first,
                window=rule.window,
            )
            add(run.local, *partial)


class SparseChunks:
    """Queries see what the pattern shows them. `kv_heads` are this TP rank's, numbered over all."""

    def __init__(self, pattern: CSAPattern, prompt_len: int, kv_heads: range) -> None:
        self._pattern, self._prompt_len, self._kv_heads = pattern, prompt_len, kv_heads

    def attend(
        self,
        runs: Sequence[Run],
        q_TNH: Tensor,
        keys: range,
        kv_SKH: tuple[Tensor, Tensor],
        layer: int,
        rule: SoftmaxParams,
        add: Add,
    ) -> None:
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
        whole = slice(0, len(q_TNH))
        plain = [piece for piece in joined if isinstance(piece, Piece)]
        if plain:
            k, v = kv_SKH
            add(whole, *attend_pieces(q_TNH, k, v, plain, scale=rule.scale))
        for piece in joined:
            if isinstance(piece, BlockPiece):
                rows = torch.cat([torch.arange(r.start, r.stop) for r in piece.keys.ranges()])
                k, v = (x.index_select(0, rows.to(x.device)) for x in kv_SKH)
                dense = [Piece(piece.queries, range(len(rows)), piece.kv_heads)]
                add(whole, *attend_pieces(q_TNH, k, v, dense, scale=rule.scale))


def _attend_all(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Without a mask the query heads of a KV head are just more rows, so keys and values are never
    repeated."""
    tokens, heads, width = q_TNH.shape
    kv_heads = k_SKH.shape[1]
    repeats = heads // kv_heads
    if repeats == 1:
        return attend(q_TNH, k_SKH, v_SKH, scale=scale, causal=False)
    rows = q_TNH.unflatten(1, (kv_heads, repeats)).transpose(1, 2).reshape(-1, kv_heads, width)
    out, lse = attend(rows, k_SKH, v_SKH, scale=scale, causal=False)
    out_TNH = out.reshape(tokens, repeats, kv_heads, width).transpose(1, 2).reshape(q_TNH.shape)
    lse_TN = lse.reshape(tokens, repeats, kv_heads).transpose(1, 2).reshape(tokens, heads)
    return out_TNH, lse_TN


def _shift(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by, numbers.step)
