"""The compact order of keys in a buffer: of each sequence and degree d one row for d positions.

    positions  0 1 2 3 | 4 5 6 7 | 8 9 ..     degree 4, a head that keeps residue 1: rows are the keys 1, 5, 9
    rows          0         1        2        a head that keeps residue 2: 2, 6, 10

So strided keys become neighbours and all heads share the row numbers, whatever their residues. Pure numpy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from sps2_mega.attention.pattern import residue
from sps2_mega.attention.work_rows import NO_ROWS, Asked, TokenPlaces, join_intervals


class KeySegments:
    """Segments for the keys of all `asked` pieces: intervals of rows of one sequence and degree."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        intervals: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for one in asked:
            for piece in one.pieces:
                degree = piece.keys.step
                interval = (piece.keys[0] // degree, piece.keys[-1] // degree)
                intervals.setdefault((one.run.sequence, degree), set()).add(interval)
        self.num_rows = 0
        # Per sequence and degree: first rows in compact numbers, and in the buffer.
        self._segments: dict[tuple[int, int], tuple[list[int], list[int], list[int]]] = {}
        for key, members in intervals.items():
            lows, highs, starts = [], [], []
            for low, high in join_intervals(members):
                lows.append(low)
                highs.append(high)
                starts.append(self.num_rows)
                self.num_rows += high - low + 1
            self._segments[key] = lows, highs, starts

    def rows(self, sequence: int, keys: range) -> range:
        """Buffer rows of the keys of a piece: neighbours."""
        lows, _, starts = self._segments[sequence, keys.step]
        number = keys.start // keys.step
        place = bisect_right(lows, number) - 1
        first = starts[place] + number - lows[place]
        return range(first, first + len(keys))

    def codes(self, places: TokenPlaces, kv_heads: range, held: range, layer: int) -> np.ndarray:
        """The code of each (row, KV head) of the buffer, row by row. `kv_heads` are numbered among the `held` ones,
        those over all ranks. Rows without a key of a head get some code."""
        found = [NO_ROWS]
        for (sequence, degree), (lows, highs, _) in self._segments.items():
            residues = [residue(held.start + head, layer, degree) for head in kv_heads]
            for low, high in zip(lows, highs, strict=True):
                positions = np.arange(low, high + 1)[:, None] * degree + np.array(residues)
                tokens = places.tokens(sequence, positions)
                codes = tokens * len(held) + np.arange(kv_heads.start, kv_heads.stop)
                found.append(codes.ravel())
        return np.concatenate(found)
