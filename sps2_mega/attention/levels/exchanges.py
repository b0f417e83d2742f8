"""Exchanges of a prefill step: which rank computes what, each transport as a rule over ranks.

Pure ints. A pair (a, b) is the queries of rank a against the keys of rank b. Where a pair is
computed decides what travels:

    own      (a, a) at a                              nothing
    gather   (a, b) at a                              K and V                 pass-KV, all at once
    ring     (a, b) at a, one distance per exchange   K and V                 pass-KV, in turn
    pass_q   (a, b) at b                              Q and partials          pass-Q
    ulysses  (a, b) at all ranks, each its heads      Q, K, V and partials

A pair belongs to the SP level whose group is the smallest that holds both ranks, and each level may
have its own transport. The tokens of a pair, and which of them are visible, are decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sps2_mega.attention.layout.heads import split_heads
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.topology import group_sizes_of, level_of

Kind = Literal["own", "gather", "ring", "pass_q", "ulysses"]
LEVEL_TRANSPORTS: tuple[Kind, ...] = ("gather", "ring", "pass_q", "ulysses")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One exchange between ranks and the attention computed after it.

    `level` is None where pairs of all levels but 0 belong to it. `queries` are the ones that see
    all keys (`tail`), the others (`body`), or both. `distance` is how far a ring step reaches.
    `num_heads` and `num_kv_heads` count this TP rank's heads; `kv_part` (i, n) takes part i of n of
    them.
    """

    kind: Kind
    group_sizes: tuple[int, ...]  # ranks of a group of each SP level, (1, ..., all)
    num_heads: int
    num_kv_heads: int
    level: int | None = None
    queries: Literal["all", "body", "tail"] = "body"
    distance: int = 0
    kv_part: tuple[int, int] = (0, 1)

    @property
    def name(self) -> str:
        """Name for logs and traces, as `gather level 2, heads 1/4`."""
        words: str = "tail" if self.queries == "tail" else self.kind
        if self.level is not None and self.kind != "own":
            words += f" level {self.level}"
        if self.distance:
            words += f" step {self.distance}"
        part, parts = self.kv_part
        return words if parts == 1 else f"{words}, heads {part + 1}/{parts}"

    @property
    def keys_stay(self) -> bool:
        return self.kind in ("own", "pass_q")

    @property
    def queries_stay(self) -> bool:
        return self.kind in ("own", "gather", "ring")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Parts that must arrive before it is computed: `kv`, `q`."""
        keys = () if self.keys_stay else ("kv",)
        return keys if self.queries_stay else (*keys, "q")

    def takes(self, at: int, a: int, b: int) -> bool:
        """Tell whether rank `at` computes queries of rank a against keys of rank b."""
        level = level_of(a, b, self.group_sizes)
        if level != self.level and (self.level is not None or level == 0):
            return False
        match self.kind:
            case "own":
                return at == a == b
            case "gather":
                return at == a
            case "ring":
                return at == a and (a - b) % self.group_sizes[-1] == self.distance
            case "pass_q":
                return at == b
            case "ulysses":
                assert self.level is not None
                return level_of(at, a, self.group_sizes) <= self.level
        raise AssertionError(self.kind)

    def heads(self, at: int) -> list[tuple[range, range]]:
        """Return what rank `at` computes: (query heads, KV heads), evenly many per KV head."""
        part, parts = self.kv_part
        kv = range(part * self.num_kv_heads // parts, (part + 1) * self.num_kv_heads // parts)
        per_kv_head = self.num_heads // self.num_kv_heads
        if self.kind != "ulysses":
            return [(range(kv.start * per_kv_head, kv.stop * per_kv_head), kv)] if kv else []
        assert self.level is not None
        size = self.group_sizes[self.level]
        mine, kv_mine = split_heads(len(kv) * per_kv_head, len(kv), size)[at % size]
        if not mine:
            return []
        first, first_kv = kv.start * per_kv_head, kv.start
        if len(mine) % per_kv_head == 0 and mine.start % per_kv_head == 0:
            return [(_shift(mine, first), _shift(kv_mine, first_kv))]
        return [
            (
                range(
                    first + max(mine.start, head * per_kv_head),
                    first + min(mine.stop, (head + 1) * per_kv_head),
                ),
                range(first_kv + head, first_kv + head + 1),
            )
            for head in kv_mine
        ]


def prefill_exchanges(
    transports: Sequence[str],
    sp_levels: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    kv_parts: int = 1,
) -> list[Exchange]:
    """List the exchanges of one prefill in the order in which they are best computed.

    First the one that needs nothing from others, then those with results to return, the smallest
    first. Each pair of ranks is in one exchange for each kind of queries. `transports` names one
    transport per SP level, innermost first, or one for all. `kv_parts` cuts every exchange into
    that many by KV heads; the heads need not divide evenly.

    Raises:
        ConfigError: a transport is unknown, or there are not as many as levels.
    """
    unknown = [name for name in transports if name not in LEVEL_TRANSPORTS]
    if unknown:
        raise ConfigError(f"transport {unknown[0]!r} is not one of {', '.join(LEVEL_TRANSPORTS)}")
    if len(transports) not in (1, len(sp_levels)):
        raise ConfigError(
            f"transports {','.join(transports)} are {len(transports)}: give one, or one for each "
            f"of the {len(sp_levels)} SP levels"
        )
    group_sizes = group_sizes_of(sp_levels)

    def exchange(kind: Kind, **rest: object) -> Exchange:
        return Exchange(
            kind=kind,
            group_sizes=group_sizes,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            **rest,  # type: ignore[arg-type]
        )

    parts = min(kv_parts, num_kv_heads)
    exchanges = [exchange("own", level=0, queries="all")]
    for level in range(1, len(group_sizes)):
        if group_sizes[level] == group_sizes[level - 1]:
            continue
        kind: Kind = transports[level - 1 if len(transports) > 1 else 0]  # type: ignore[assignment]
        for part in range(parts):
            steps = _ring_distances(group_sizes, level) if kind == "ring" else [0]
            exchanges += [
                exchange(kind, level=level, distance=step, kv_part=(part, parts)) for step in steps
            ]
    if group_sizes[-1] > 1:
        exchanges.append(exchange("pass_q", queries="tail"))
    order = {"own": 0, "pass_q": 1, "ulysses": 2, "gather": 3, "ring": 3}
    return sorted(exchanges, key=lambda one: (order[one.kind], one.queries == "body"))


def _ring_distances(group_sizes: Sequence[int], level: int) -> list[int]:
    """Return the distances a - b, modulo all ranks, at which pairs of this level lie."""
    ranks = range(group_sizes[-1])
    return sorted(
        {
            (a - b) % group_sizes[-1]
            for a in ranks
            for b in ranks
            if level_of(a, b, group_sizes) == level
        }
    )


def _shift(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by)
