"""Rows that the pieces of an exchange touch, as sorted integer codes.

A key row is one KV head of one token, a query row one query head of one token:

    code = token in sequence order * heads + head

Both ranks of an exchange derive the same list from the pattern, so they agree without asking. Pure
numpy; `plan` decides what travels to whom.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sps2_mega.attention.csa.key_blocks import KeyBlocks
from sps2_mega.attention.layout.token_layout import TokenLayout
from sps2_mega.attention.levels.demand import Demand

NO_ROWS = np.zeros(0, dtype=np.int64)


class TokenPlaces:
    """Places of a layout's tokens: numbers in sequence order -> (SP rank, local number)."""

    def __init__(self, layout: TokenLayout) -> None:
        self._number_0 = [
            start - first for start, first in zip(layout.seq_starts(), layout.first, strict=True)
        ]
        self._last = layout.last
        size = sum(layout.counts)
        self.rank, self.local = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for run in layout.runs:
            tokens = self.tokens(run.sequence, range(run.start, run.end))
            self.rank[tokens] = run.rank
            self.local[tokens] = run.local_start + np.arange(run.num_tokens)

    def tokens(self, sequence: int, positions: range | np.ndarray) -> np.ndarray:
        """Return the numbers in sequence order of positions of a sequence.

        A position beyond the sequence gets the number of its last token.
        """
        if isinstance(positions, range):
            positions = np.arange(positions.start, positions.stop, positions.step)
        return self._number_0[sequence] + np.minimum(positions, self._last[sequence] - 1)


def key_codes(demands: Iterable[Demand], places: TokenPlaces, num_kv_heads: int) -> np.ndarray:
    """Return the sorted codes of all key rows that the pieces read, each once."""
    wanted = (
        (one.run.sequence, kept_keys(piece.keys), _shift(piece.kv_heads, one.kv_heads.start))
        for one in demands
        for piece in one.pieces
    )
    return _codes(wanted, places, num_kv_heads)


def query_codes(demands: Iterable[Demand], places: TokenPlaces, num_heads: int) -> np.ndarray:
    """Return the sorted codes of all query rows that have pieces, each once."""
    wanted = []
    for one in demands:
        per_kv_head = len(one.heads) // len(one.kv_heads)
        for piece in one.pieces:
            for kv_head in piece.kv_heads:
                first = one.heads.start + kv_head * per_kv_head
                heads = range(first, first + per_kv_head)
                wanted.append((one.run.sequence, kept_keys(piece.queries), heads))
    return _codes(wanted, places, num_heads)


def kept_keys(keys: range | KeyBlocks) -> KeyBlocks:
    """Return a range as blocks of one position, so that keys have one form."""
    if isinstance(keys, KeyBlocks):
        return keys
    number, residue = divmod(keys.start, keys.step)
    return KeyBlocks(number, number + len(keys), keys.step, residue, 1)


def rows_of(codes: np.ndarray, places: TokenPlaces, num_heads: int) -> np.ndarray:
    """Return the (token, head) row numbers of codes on the rank that holds the tokens."""
    tokens, heads = np.divmod(codes, num_heads)
    return places.local[tokens] * num_heads + heads


class Finder:
    """Index of a buffer: code -> row."""

    def __init__(self, codes: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> None:
        all_codes = np.concatenate([NO_ROWS, *codes])
        order = np.argsort(all_codes, kind="stable")
        self._codes = all_codes[order]
        self._rows = np.concatenate([NO_ROWS, *rows])[order]

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """Return the rows of the codes; 0 for missing ones, which nobody reads."""
        if not len(self._codes):
            return np.zeros_like(codes)
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[at] == codes, self._rows[at], 0)


def _codes(
    wanted: Iterable[tuple[int, KeyBlocks, range]], places: TokenPlaces, num_heads: int
) -> np.ndarray:
    # Far keys of neighbouring cells are nested; joined first, they are enumerated once.
    intervals: dict[tuple[int, int, int, int, range], set[tuple[int, int]]] = {}
    for sequence, kept, heads in wanted:
        kind = (sequence, kept.degree, kept.block, kept.residue, heads)
        intervals.setdefault(kind, set()).add((kept.first, kept.stop - 1))
    found = [NO_ROWS]
    for (sequence, degree, block, residue, heads), members in intervals.items():
        head_numbers = np.arange(heads.start, heads.stop, heads.step)
        for low, high in join_intervals(members):
            positions = kept_positions(np.arange(low, high + 1), degree, block, residue)
            tokens = places.tokens(sequence, positions)
            found.append((tokens[:, None] * num_heads + head_numbers).ravel())
    return np.unique(np.concatenate(found))


def kept_positions(
    numbers: np.ndarray, degree: int, block: int, residue: int | np.ndarray
) -> np.ndarray:
    """Return the positions of kept keys by their numbers (`KeyBlocks`)."""
    groups, offsets = np.divmod(numbers, block)
    return (groups * degree + residue) * block + offsets


def join_intervals(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge overlapping closed intervals; the result ascends."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(intervals):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return joined


def _shift(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by, numbers.step)
