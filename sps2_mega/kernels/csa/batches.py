"""Batches of sparse attention's pieces for one fused call: equal shapes at even distances.

A long prompt has many cells of one span, so triangles, and halos, differ only by their start; and
the KV heads of one residue have the same far rectangle, a constant number of heads further on. A
fused kernel has one batch axis, so a batch moves along the sequence or along the heads. Pure
Python; kernels turn a batch into views of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sps2_mega.kernels.csa.piece import Piece


@dataclass(frozen=True, slots=True)
class Batch:
    """`count` pieces at constant steps of queries, keys or heads, beginning with `first`.

    The KV heads of `first` are neighbours. `fresh`: no earlier batch has
    touched any of its (query, head) pairs.
    """

    first: Piece
    count: int = 1
    query_step: int = 0
    key_step: int = 0
    head_step: int = 0
    fresh: bool = False

    def last(self) -> Piece:
        steps = self.count - 1
        return Piece(
            _shift(self.first.queries, steps * self.query_step),
            _shift(self.first.keys, steps * self.key_step),
            _shift(self.first.kv_heads, steps * self.head_step),
            self.first.causal,
        )


def batch_pieces(pieces: Sequence[Piece]) -> list[Batch]:
    """Group all pieces into batches, triangles first; a batch has no (query, head) twice."""
    batches: list[Batch] = []
    touched: list[tuple[int, int, int, int]] = []
    for same in _by_shape(pieces):
        for run in _evenly_spaced(same):
            for batch in _along_one_axis(run):
                box = _box(batch)
                fresh = not any(_overlap(box, other) for other in touched)
                touched.append(box)
                batches.append(replace(batch, fresh=fresh))
    return batches


def split_triangles(pieces: Sequence[Piece], longest: int) -> list[Piece]:
    """Split triangles so that none has more than `longest` queries; the pairs stay the same.

    A longer one becomes two triangles and the rectangle between them, cut so that all
    small triangles but the last have one size.
    """
    split: list[Piece] = []
    for piece in pieces:
        rows = len(piece.queries)
        if not piece.causal or rows <= longest:
            split.append(piece)
            continue
        half = longest
        while 2 * half < rows:
            half *= 2
        corners = [
            replace(piece, queries=piece.queries[part], keys=piece.keys[part])
            for part in (slice(half), slice(half, None))
        ]
        split += split_triangles(corners, longest)
        split.append(Piece(piece.queries[half:], piece.keys[:half], piece.kv_heads))
    return split


def _by_shape(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    groups: dict[tuple[object, ...], list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: (not piece.causal, piece.queries[0])):
        shape = (
            piece.causal,
            len(piece.queries),
            piece.queries.step,
            len(piece.keys),
            piece.keys.step,
            piece.kv_heads,
        )
        groups.setdefault(shape, []).append(piece)
    return iter(groups.values())


def _evenly_spaced(same: list[Piece]) -> Iterator[list[Piece]]:
    """Cut pieces of one shape, sorted by queries, into runs of constant distance."""
    run: list[Piece] = []
    for piece in same:
        if run and not _continues(run, piece):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _continues(run: list[Piece], piece: Piece) -> bool:
    query_step, key_step = _distance(run[-1], piece)
    if run[-1].queries[-1] >= piece.queries[0] or key_step < 0:
        return False
    return len(run) == 1 or (query_step, key_step) == _distance(run[-2], run[-1])


def _distance(before: Piece, after: Piece) -> tuple[int, int]:
    return after.queries[0] - before.queries[0], after.keys[0] - before.keys[0]


def _along_one_axis(run: list[Piece]) -> Iterator[Batch]:
    heads = run[0].kv_heads
    query_step, key_step = _distance(run[0], run[1]) if len(run) > 1 else (0, 0)
    neighbours = heads.step == 1 or len(heads) == 1
    if neighbours or len(run) >= len(heads):
        for members in [heads] if neighbours else (range(head, head + 1) for head in heads):
            yield Batch(replace(run[0], kv_heads=members), len(run), query_step, key_step)
        return
    for piece in run:
        one_head = replace(piece, kv_heads=heads[:1])
        yield Batch(one_head, count=len(heads), head_step=heads.step)


def _box(batch: Batch) -> tuple[int, int, int, int]:
    """First and last query, first and last KV head."""
    first, last = batch.first, batch.last()
    return first.queries[0], last.queries[-1], first.kv_heads[0], last.kv_heads[-1]


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1] and one[2] <= other[3] and other[2] <= one[3]


def _shift(positions: range, by: int) -> range:
    return range(positions.start + by, positions.stop + by, positions.step)
