"""Compact order of keys in a buffer: one row per d positions of each sequence and degree d.

    positions  0 1 2 3 | 4 5 6 7 | 8 9 ..     degree 4
    rows          0         1        2        residue 1: keys 1, 5, 9; residue 2: keys 2, 6, 10

So strided keys become neighbours, and all heads share the row numbers, whatever their residues.
Pure numpy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from sps2_mega.attention.csa.key_blocks import KeyBlocks
from sps2_mega.attention.csa.pattern import residue
from sps2_mega.attention.levels.demand import Demand
from sps2_mega.attention.levels.rows import (
    NO_ROWS,
    TokenPlaces,
    join_intervals,
    kept_keys,
    kept_positions,
)


class KeySegments:
    """Segments of a buffer for the keys of all demands.

    A segment is an interval of rows of one sequence, degree and block size.
    """

    def __init__(self, demands: Sequence[Demand]) -> None:
        intervals: dict[tuple[int, int, int], set[tuple[int, int]]] = {}
        for one in demands:
            for piece in one.pieces:
                kept = kept_keys(piece.keys)
                kind = one.run.sequence, kept.degree, kept.block
                intervals.setdefault(kind, set()).add((kept.first, kept.stop - 1))
        self.num_rows = 0
        # For each kind, the first and last number of each segment and its first row in the buffer.
        self._segments: dict[tuple[int, int, int], tuple[list[int], list[int], list[int]]] = {}
        for kind, members in intervals.items():
            lows, highs, starts = [], [], []
            for low, high in join_intervals(members):
                lows.append(low)
                highs.append(high)
                starts.append(self.num_rows)
                self.num_rows += high - low + 1
            self._segments[kind] = lows, highs, starts

    def rows(self, sequence: int, keys: range | KeyBlocks) -> range:
        """Return the buffer rows of the keys of a piece, which are neighbours."""
        kept = kept_keys(keys)
        lows, _, starts = self._segments[sequence, kept.degree, kept.block]
        place = bisect_right(lows, kept.first) - 1
        first = starts[place] + kept.first - lows[place]
        return range(first, first + len(keys))

    def codes(self, places: TokenPlaces, kv_heads: range, held: range, layer: int) -> np.ndarray:
        """Return the code of each (row, KV head) of the buffer, row by row.

        `kv_heads` are numbered among the `held` ones, which are numbered over all ranks. A row
        without a key of a head gets some code.
        """
        found = [NO_ROWS]
        for (sequence, degree, block), (lows, highs, _) in self._segments.items():
            residues = np.array([residue(held.start + head, layer, degree) for head in kv_heads])
            for low, high in zip(lows, highs, strict=True):
                numbers = np.arange(low, high + 1)[:, None]
                tokens = places.tokens(sequence, kept_positions(numbers, degree, block, residues))
                codes = tokens * len(held) + np.arange(kv_heads.start, kv_heads.stop)
                found.append(codes.ravel())
        return np.concatenate(found)
