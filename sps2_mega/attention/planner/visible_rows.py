"""Visible rows and pairs of a sparse prefill step, between every two SP ranks.

Counted from the CSA pattern itself, in one layer: the others differ by a rotation. `by_level` makes
seconds of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.attention.layout.token_layout import PrefillLayout, Run
from sps2_mega.attention.planner.sparse_volume import visible_keys


@dataclass(frozen=True, slots=True)
class Pair:
    """Queries of one SP rank against keys of another.

    `pairs` are visible (query, key, KV head) triples, rows are the (query, KV head) and (key, KV
    head) that take part, and `partial_rows` the (query, KV head) of each piece: partials to merge.
    """

    pairs: int
    query_rows: int
    key_rows: int
    partial_rows: int


def visible_between(
    layout: PrefillLayout,
    patterns: Sequence[CSAPattern],
    tail_starts: Sequence[int],
    kv_heads: range,
) -> dict[tuple[int, int], Pair]:
    """Count what queries before the exact tail see, by (rank of queries, rank of keys).

    Ranks between which nothing is visible are left out.
    """
    found: dict[tuple[int, int], Pair] = {}
    key_runs: dict[int, list[Run]] = {}
    for run in layout.keys.runs:
        key_runs.setdefault(run.sequence, []).append(run)
    for run in layout.queries.runs:
        queries = range(run.start, min(run.end, tail_starts[run.sequence]))
        for keys in key_runs[run.sequence] if queries else []:
            if keys.start >= queries.stop:
                break
            arguments = dict(
                prompt_len=tail_starts[run.sequence] + patterns[run.sequence].tail,
                queries=queries,
                keys=range(keys.start, keys.end),
                kv_heads=kv_heads,
                layer=0,
            )
            pieces = csa_pieces(patterns[run.sequence], **arguments)  # type: ignore[arg-type]
            if not pieces:
                continue
            rows = visible_keys(patterns[run.sequence], **arguments)  # type: ignore[arg-type]
            first = min(piece.queries[0] for piece in pieces)
            last = max(piece.queries[-1] for piece in pieces)
            stride = min(piece.queries.step for piece in pieces)
            before = found.get((run.rank, keys.rank), Pair(0, 0, 0, 0))
            found[run.rank, keys.rank] = Pair(
                before.pairs + sum(piece.num_pairs * len(piece.kv_heads) for piece in pieces),
                before.query_rows + ((last - first) // stride + 1) * len(kv_heads),
                before.key_rows + sum(part.num_rows for part in rows),
                before.partial_rows
                + sum(len(piece.queries) * len(piece.kv_heads) for piece in pieces),
            )
    return found
