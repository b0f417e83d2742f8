"""Tables of one kernel launch, made from pieces: the queries and key segments of each program.

Per KV head, queries are cut into runs that see the same pieces, and runs into
tiles. A run whose pieces stride over queries is split by residue, so that every row
of a tile sees all key segments of the tile:

    tiles     kv_head, first query row, query step, queries, first segment, end of segments, part
    segments  first key row, key step, keys, causal

Rows count from the first row of q and of k. A query at position p sees a causal segment's keys at
positions <= p. With several parts, the keys of each run are divided among that many tiles, whose
partials are then merged by LSE. Pure ints and numpy: no kernel, no device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sps2_mega.kernels.csa.piece import Piece

TILE_COLUMNS = 7
SEGMENT_COLUMNS = 4

# Segment bounds inside a run that is divided into parts: a multiple of any tile of keys.
_PART_ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class TilePlan:
    """`tiles` int32 [number, 7], most work first; `segments` int32 [number, 4].

    Every query row of every KV head is in exactly one tile of each part.
    """

    tiles: np.ndarray
    segments: np.ndarray
    num_parts: int


@dataclass(frozen=True, slots=True)
class _Segment:
    first: int
    step: int
    count: int
    causal: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """`count` query rows `first`, `first + step`, ... that see the same segments."""

    first: int
    step: int
    count: int
    segments: list[_Segment]


def plan_tiles(
    pieces: Sequence[Piece],
    *,
    queries: range,
    keys: range,
    num_kv_heads: int,
    tile_queries: int,
    num_parts: int = 1,
) -> TilePlan:
    """Tables for the positions `queries` and `keys` that the tensors hold.

    Raises:
        ValueError: a piece reaches outside the given queries, keys or KV heads.
    """
    tiles: list[np.ndarray] = []
    costs: list[np.ndarray] = []
    segments: list[tuple[int, int, int, int]] = []
    of_head: list[list[Piece]] = [[] for _ in range(num_kv_heads)]
    for piece in pieces:
        _check_bounds(piece, queries, keys, num_kv_heads)
        for head in piece.kv_heads:
            of_head[head].append(piece)
    for head, own in enumerate(of_head):
        for run in _runs(own, queries, keys.start):
            for part, group in enumerate(_divide(run.segments, num_parts)):
                first_segment = len(segments)
                segments += [(s.first, s.step, s.count, int(s.causal)) for s in group]
                first = run.first + np.arange(0, run.count, tile_queries) * run.step
                count = np.minimum(tile_queries, run.count - np.arange(0, run.count, tile_queries))
                table = np.empty((len(first), TILE_COLUMNS), dtype=np.int32)
                table[:, 0], table[:, 1], table[:, 2], table[:, 3] = head, first, run.step, count
                table[:, 4], table[:, 5], table[:, 6] = first_segment, len(segments), part
                tiles.append(table)
                last = first + (count - 1) * run.step + queries.start - keys.start
                costs.append(_visible(group, last))
    joined = np.concatenate([np.empty((0, TILE_COLUMNS), dtype=np.int32), *tiles])
    cost = np.concatenate([np.empty(0, dtype=np.int64), *costs])
    return TilePlan(
        # Programs start in order: long ones at the end would leave the device half idle.
        tiles=joined[np.argsort(-cost, kind="stable")],
        segments=np.array(segments, dtype=np.int32).reshape(-1, SEGMENT_COLUMNS),
        num_parts=num_parts,
    )


def _check_bounds(piece: Piece, queries: range, keys: range, num_kv_heads: int) -> None:
    for name, of_piece, held in (
        ("queries", piece.queries, queries),
        ("keys", piece.keys, keys),
        ("KV heads", piece.kv_heads, range(num_kv_heads)),
    ):
        if of_piece[0] < held.start or of_piece[-1] >= held.stop:
            raise ValueError(
                f"a piece has {name} {of_piece[0]}..{of_piece[-1]}, "
                f"the tensor has [{held.start}, {held.stop})"
            )


def _runs(pieces: Sequence[Piece], queries: range, k_start: int) -> Iterator[_Run]:
    """All query rows of one KV head, including those that see nothing."""
    step = math.lcm(*(piece.queries.step for piece in pieces))
    for rest in range(min(step, len(queries))):
        count = -(-(len(queries) - rest) // step)
        opened: dict[int, list[int]] = {}
        closed: dict[int, list[int]] = {}
        for index, piece in enumerate(pieces):
            if (queries.start + rest - piece.queries[0]) % piece.queries.step:
                continue
            begin = -(-(piece.queries[0] - queries.start - rest) // step)
            end = (piece.queries[-1] - queries.start - rest) // step + 1
            if begin < end:
                opened.setdefault(begin, []).append(index)
                closed.setdefault(end, []).append(index)
        active: dict[int, _Segment] = {}
        cuts = sorted({0, count, *opened, *closed})
        for begin, end in itertools.pairwise(cuts):
            for index in closed.get(begin, []):
                del active[index]
            for index in opened.get(begin, []):
                active[index] = _segment(pieces[index], k_start)
            # The diagonal is last, so that masked tiles are the end of a program.
            ordered = sorted(active.values(), key=lambda s: (s.causal, s.first))
            yield _Run(rest + begin * step, step, end - begin, ordered)


def _segment(piece: Piece, k_start: int) -> _Segment:
    return _Segment(piece.keys[0] - k_start, max(1, piece.keys.step), len(piece.keys), piece.causal)


def _divide(segments: Sequence[_Segment], num_parts: int) -> list[list[_Segment]]:
    """Divide the segments into `num_parts` lists of about equally many keys.

    Causal segments stay whole, in the last list.
    """
    if num_parts == 1:
        return [list(segments)]
    total = sum(s.count for s in segments if not s.causal)
    share = -(-total // (num_parts * _PART_ALIGNMENT)) * _PART_ALIGNMENT
    parts: list[list[_Segment]] = [[] for _ in range(num_parts)]
    part, room = 0, share
    for segment in segments:
        if segment.causal:
            parts[-1].append(segment)
            continue
        done = 0
        while done < segment.count:
            if room == 0:
                part, room = part + 1, share
            taken = min(room, segment.count - done)
            first = segment.first + done * segment.step
            parts[part].append(_Segment(first, segment.step, taken, False))
            done, room = done + taken, room - taken
    return parts


def _visible(segments: Sequence[_Segment], last_key_row: np.ndarray) -> np.ndarray:
    """Number of keys that each tile's last query sees.

    `last_key_row` is the row in k of that query's own position.
    """
    seen = np.zeros(len(last_key_row), dtype=np.int64)
    for s in segments:
        if s.causal:
            seen += np.clip((last_key_row - s.first) // s.step + 1, 0, s.count)
        else:
            seen += s.count
    return seen
