"""Sparse attention in the form that suits the device and the pieces.

On CUDA one launch of our own kernel computes many pieces at once, without partials in memory.
A dense run, which is a rectangle and a triangle of neighbouring rows, is left to the
libraries' attention kernels, which are made for it: they are faster there, and one merge costs
little. On CPU torch's kernel computes everything.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sps2_mega.kernels.backend import Backend, choose
from sps2_mega.kernels.csa import sdpa
from sps2_mega.kernels.csa.piece import Piece
from sps2_mega.kernels.csa.tile_shape import fits


def attend_pieces(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    pieces: Sequence[Piece],
    *,
    scale: float,
    q_start: int = 0,
    k_start: int = 0,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint pieces, as `reference.attend_pieces`.

    Args:
        q_TNH: [T, N, H].
        k_SKH, v_SKH: [S, K, H].
        pieces: disjoint pieces; their ranges are positions in tokens.
        scale: factor of the scores.
        q_start: position of row 0 of q.
        k_start: position of row 0 of k and v.
        backend: form to use; None lets device and pieces decide.
    """
    if backend is None and (is_dense_run(pieces) or not _fits(q_TNH, k_SKH)):
        backend = Backend.TORCH
    if choose(q_TNH.device, backend) is Backend.TRITON:
        from sps2_mega.kernels.csa import triton

        form = triton.attend_pieces
    else:
        form = sdpa.attend_pieces
    return form(q_TNH, k_SKH, v_SKH, pieces, scale=scale, q_start=q_start, k_start=k_start)


def is_dense_run(pieces: Sequence[Piece]) -> bool:
    """Whether the pieces are at most a rectangle and a triangle, with all steps 1."""
    return len(pieces) <= 2 and all(
        max(piece.queries.step, piece.keys.step, piece.kv_heads.step) == 1 for piece in pieces
    )


def _fits(q_TNH: Tensor, k_SKH: Tensor) -> bool:
    group = q_TNH.shape[1] // max(1, k_SKH.shape[1])
    return fits(q_TNH.shape[2], q_TNH.element_size(), group)
