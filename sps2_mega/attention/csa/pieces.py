"""Pieces of a CSA pattern: disjoint rectangles and triangles of strided ranges, without masks.

A run of queries is cut into segments in which all queries see the same cells:

    keys    0 .......................................... start .... stop
    segment [sinks| 1 in d_2 | 1 in d_1 |halo| own cell ][  triangle   ]

The keys before a segment form bands of one degree each (rectangles), and its own keys a triangle. A
band of degree d is one piece per residue of KV heads. Sinks and halo are bands of degree 1, and
neighbouring bands of one degree are joined, so where a pattern is dense it costs what exact
attention costs. Ranges are positions; the tensors behind them are chosen elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sps2_mega.attention.csa.key_blocks import BlockPiece, CSAPiece, KeyBlocks, key_blocks
from sps2_mega.attention.csa.pattern import CSAPattern, residue
from sps2_mega.kernels.csa.piece import Piece


def csa_pieces(
    pattern: CSAPattern,
    *,
    prompt_len: int,
    queries: range,
    kv_heads: range,
    layer: int,
    keys: range | None = None,
) -> list[CSAPiece]:
    """Cut `queries` against `keys` into pieces; each visible (i, j) of a KV head is in exactly one.

    `keys` are neighbouring positions, by default all up to the last query. `kv_heads` are
    neighbouring KV heads, numbered over all ranks; the pieces count them from 0. The result depends
    on the layer only by its remainder for each degree.
    """
    assert queries.step == 1 and kv_heads.step == 1 and (keys is None or keys.step == 1)
    if keys is None:
        keys = range(queries.stop)
    if not kv_heads:
        return []
    heads = _Heads(kv_heads, layer)
    found: list[CSAPiece] = []
    for segment in _segments(pattern, prompt_len, queries, keys):
        dense = pattern.exact or segment.start >= prompt_len - pattern.tail
        for band, degree in _bands(pattern, segment.start, keys, dense):
            found += _rectangles(pattern, segment, band, degree, heads)
        if segment.start in keys:
            dense = dense or segment.start < pattern.sinks
            found += _triangles(pattern, segment, 1 if dense else pattern.degrees[0], heads)
    return join_queries(found)


def join_queries(found: Sequence[CSAPiece]) -> list[CSAPiece]:
    """Join rectangles on the same keys whose queries are neighbours, as the sinks of segments."""
    last: dict[tuple[range | KeyBlocks, range], int] = {}
    joined: list[CSAPiece] = []
    for piece in found:
        place = last.get((piece.keys, piece.kv_heads))
        if place is not None and not piece.causal:
            before = joined[place].queries
            if before.step == piece.queries.step and before[-1] + before.step == piece.queries[0]:
                both = range(before.start, piece.queries.stop, before.step)
                joined[place] = replace(joined[place], queries=both)
                continue
        if not piece.causal:
            last[piece.keys, piece.kv_heads] = len(joined)
        joined.append(piece)
    return joined


@dataclass(frozen=True, slots=True)
class _Heads:
    """KV heads of this TP rank, in classes that share a residue."""

    held: range
    layer: int

    def classes(self, degree: int) -> Iterator[tuple[int, int, range]]:
        """Yield (g % degree, residue of the keys, heads g counted from 0) of each class."""
        for rest in sorted({head % degree for head in self.held}):
            members = range((rest - self.held.start) % degree, len(self.held), degree)
            yield rest, residue(rest, self.layer, degree), members


def _segments(pattern: CSAPattern, prompt_len: int, queries: range, keys: range) -> Iterator[range]:
    """Cut the queries where the keys they see change, and where the given keys begin and end."""
    cuts = {keys.start, keys.stop}
    if not pattern.exact:
        cuts.add(prompt_len - pattern.tail)
        for span in pattern.spans:
            cuts.update(range(-(-queries.start // span) * span, queries.stop, span))
        if pattern.degrees[0] > 1:
            cuts.add(pattern.sinks)
    inside = sorted(cut for cut in cuts if queries.start < cut < queries.stop)
    for start, stop in itertools.pairwise([queries.start, *inside, queries.stop]):
        if start < stop:
            yield range(start, stop)


def _bands(
    pattern: CSAPattern, start: int, keys: range, dense: bool
) -> Iterator[tuple[range, int]]:
    """Yield (keys, degree) of the bands before a segment at `start`, far keys first."""
    end = min(start, keys.stop)
    cuts = {keys.start, end}
    if not dense:
        own = pattern.own_start(start)
        cuts |= {start // span * span for span in pattern.spans}
        cuts |= {own - pattern.halo, own, pattern.sinks}
    inside = sorted(cut for cut in cuts if keys.start <= cut <= end)
    open_band: tuple[range, int] | None = None
    for low, high in itertools.pairwise(inside):
        if dense or pattern.always_seen(start, low):
            degree = 1
        else:
            degree = pattern.degrees[pattern.level(start, low)]
        if open_band and open_band[1] == degree:
            open_band = range(open_band[0].start, high), degree
            continue
        if open_band:
            yield open_band
        open_band = range(low, high), degree
    if open_band:
        yield open_band


def _rectangles(
    pattern: CSAPattern, segment: range, band: range, degree: int, heads: _Heads
) -> Iterator[CSAPiece]:
    if degree == 1:
        yield Piece(segment, band, range(len(heads.held)))
        return
    for rest, key_rest, members in heads.classes(degree):
        queries = _every(segment, degree, rest) if pattern.sample_queries else segment
        if pattern.block > 1:
            blocks = key_blocks(band, degree=degree, residue=key_rest, block=pattern.block)
            if queries and blocks:
                yield BlockPiece(queries, blocks, members)
            continue
        keys = _every(band, degree, key_rest)
        if queries and keys:
            yield Piece(queries, keys, members)


def _triangles(pattern: CSAPattern, segment: range, degree: int, heads: _Heads) -> Iterator[Piece]:
    """Yield the pieces of a segment against its own keys.

    With a stride, queries are cut by residue too. Queries and keys then alternate in each part,
    which is a plain triangle again.
    """
    if degree == 1:
        yield Piece(segment, segment, range(len(heads.held)), causal=True)
        return
    for rest, key_rest, members in heads.classes(degree):
        for query_rest in [rest] if pattern.sample_queries else range(degree):
            queries = _every(segment, degree, query_rest)
            keys = _every(segment, degree, key_rest)
            if queries and keys and keys[0] > queries[0]:
                queries = queries[1:]  # sees none of these keys
            if queries and keys:
                yield Piece(queries, keys[: len(queries)], members, causal=True)


def _every(positions: range, degree: int, rest: int) -> range:
    """Return the positions p with p % degree == rest."""
    return range(positions.start + (rest - positions.start) % degree, positions.stop, degree)
