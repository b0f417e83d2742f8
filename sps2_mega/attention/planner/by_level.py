"""Which transport each SP level takes in a sparse prefill step: seconds from visible rows and
pairs, then the least.

    seconds per layer = latencies + communication + attention of the busiest rank, its copies
    included
    with overlap        latencies + the longer of the two, and 1/M of the shorter

M is the number of parts into which the exchanges are cut; each part has latencies of its own.

As `planner`, a pure function of the step and of what was measured, so that all ranks choose alike.
What is visible is counted from the pattern itself, in one layer: the others differ by a rotation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.attention.layout.heads import split_heads
from sps2_mega.attention.layout.token_layout import PrefillLayout, Run
from sps2_mega.attention.planner.exact import link_seconds, sockets_s
from sps2_mega.attention.planner.sparse_volume import visible_keys
from sps2_mega.attention.planner.traffic import Matrix
from sps2_mega.parallel.machine import Machine
from sps2_mega.parallel.topology import group_sizes_of, level_of

# A ring sends what a gather sends and holds less of it, at more latency: memory's choice, not
# speed's.
CANDIDATES: tuple[str, ...] = ("gather", "pass_q", "ulysses")
_MESSAGES = {"gather": 1, "pass_q": 2, "ulysses": 3}


@dataclass(frozen=True, slots=True)
class Pair:
    """Queries of one sp rank against keys of another: visible (query, key, KV head) triples,
    (query, KV head) and (key, KV head) rows that take part, and `partial_rows`, (query, KV head) of
    each piece: partials to merge."""

    pairs: int
    query_rows: int
    key_rows: int
    partial_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelChoice:
    """`seconds` per layer of each combination of transports, innermost level first; `transports` is
    the best."""

    transports: tuple[str, ...]
    seconds: dict[tuple[str, ...], float]
    reason: str


def visible_between(
    layout: PrefillLayout,
    patterns: Sequence[CSAPattern],
    tail_starts: Sequence[int],
    kv_heads: range,
) -> dict[tuple[int, int], Pair]:
    """What queries before the exact tail see, for each (rank of queries, rank of keys) that has
    any."""
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


def choose_levels(
    visible: dict[tuple[int, int], Pair],
    machine: Machine,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    parts: int | None,
) -> LevelChoice:
    """The fastest combination; among equals the one with `gather` innermost. Heads are those of one
    TP rank; `parts` is how often exchanges are cut (`leveled.num_kv_parts`), None where nothing
    overlaps."""
    heads = _Heads(num_heads, num_kv_heads, head_dim * itemsize)
    latency_s = max(link.latency_s for link in machine.links)
    work_s = {
        name: machine.work_s.get(name, messages * latency_s) for name, messages in _MESSAGES.items()
    }
    costs: dict[tuple[str, ...], tuple[float, float]] = {}
    for names in itertools.product(CANDIDATES, repeat=len(machine.sp_levels)):
        moved, work = _spread(visible, names, group_sizes_of(machine.sp_levels), heads)
        busy_s = [
            head_dim * (done.pairs * 4 / machine.flops_per_s + done.merged_rows * machine.merge_s)
            + handled
            for done, handled in zip(work, _handling_s(moved, itemsize, machine), strict=True)
        ]
        # Who is left when others have finished has their share of the cores.
        compute_s = max(sum(busy_s) / len(busy_s), max(busy_s) / machine.ranks_per_core)
        costs[names] = link_seconds(moved, machine), compute_s
    seconds = {
        names: sum(work_s[name] for name in names) * (parts or 1)
        + max(both)
        + min(both) / (parts or 1)
        for names, both in costs.items()
    }
    best = min(seconds, key=seconds.__getitem__)
    comm_s, compute_s = costs[best]
    reason = (
        f"{_ms(seconds[best])} per layer (communication {_ms(comm_s)}, attention {_ms(compute_s)})"
    )
    for found, names in sorted((found, names) for names, found in seconds.items())[:3]:
        if names != best:
            reason += f"; {','.join(names)} {_ms(found)}"
    return LevelChoice(transports=best, seconds=seconds, reason=reason)


def _handling_s(moved: Matrix, itemsize: int, machine: Machine) -> list[float]:
    """Seconds of each rank beside attention: rows are picked before they leave and put in their
    places after they have come, and between CPUs they go through sockets."""
    sent, received = map(sum, moved), map(sum, zip(*moved, strict=True))
    copy_s = 2 * machine.copy_s / itemsize
    copied_s = [sum(both) * copy_s for both in zip(sent, received, strict=True)]
    if not machine.on_cpu:
        return copied_s
    return list(map(sum, zip(copied_s, sockets_s(moved, itemsize, machine), strict=True)))


@dataclass(frozen=True, slots=True)
class _Heads:
    num_heads: int
    num_kv_heads: int
    row_bytes: int  # of one head of one token


@dataclass(slots=True)
class _Work:
    """What one rank computes: (query, key, head) pairs, and (query, head) rows of partials that it
    merges."""

    pairs: float = 0.0
    merged_rows: float = 0.0

    def add(self, pair: Pair, heads_per_kv: float) -> None:
        self.pairs += pair.pairs * heads_per_kv
        self.merged_rows += pair.partial_rows * heads_per_kv


def _spread(
    visible: dict[tuple[int, int], Pair],
    names: Sequence[str],
    group_sizes: Sequence[int],
    heads: _Heads,
) -> tuple[Matrix, list[_Work]]:
    """Bytes from rank to rank, and what each rank computes, as `works` would do it."""
    size, row = group_sizes[-1], heads.row_bytes
    per_kv_head = heads.num_heads // heads.num_kv_heads
    moved: Matrix = [[0] * size for _ in range(size)]
    work = [_Work() for _ in range(size)]
    # Under ulysses a row goes once to whoever computes its heads, however many ranks see it or are
    # seen by it.
    dealt_queries: dict[tuple[int, int], int] = {}
    dealt_keys: dict[tuple[int, int], int] = {}
    for (a, b), pair in visible.items():
        level = level_of(a, b, group_sizes)
        name = names[level - 1] if level else "own"
        queries, keys = pair.query_rows * per_kv_head, 2 * pair.key_rows
        if name in ("own", "gather"):
            work[a].add(pair, per_kv_head)
            moved[b][a] += keys * row if level else 0
        elif name == "pass_q":
            work[a].merged_rows += queries  # when the partials are back
            work[b].add(pair, per_kv_head)
            moved[a][b] += queries * row
            moved[b][a] += queries * (row + 4)
        else:
            for at, (mine, _) in _sharing(a, level, group_sizes, heads):
                work[at].add(pair, per_kv_head * len(mine) / heads.num_heads)
            dealt_queries[a, level] = max(queries, dealt_queries.get((a, level), 0))
            dealt_keys[b, level] = max(keys, dealt_keys.get((b, level), 0))
    for (a, level), queries in dealt_queries.items():
        work[a].merged_rows += queries
        for at, (mine, _) in _sharing(a, level, group_sizes, heads):
            share = queries * len(mine) / heads.num_heads
            moved[a][at] += int(share * row)
            moved[at][a] += int(share * (row + 4))
    for (b, level), keys in dealt_keys.items():
        for at, (_, kv) in _sharing(b, level, group_sizes, heads):
            moved[b][at] += int(keys * row * len(kv) / heads.num_kv_heads)
    for rank in range(size):
        moved[rank][rank] = 0
    return moved, work


def _sharing(
    rank: int, level: int, group_sizes: Sequence[int], heads: _Heads
) -> Iterator[tuple[int, tuple[range, range]]]:
    """The ranks of the level's group around `rank`, and the heads of each."""
    size = group_sizes[level]
    shares = split_heads(heads.num_heads, heads.num_kv_heads, size)
    return enumerate(shares, start=rank // size * size)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
