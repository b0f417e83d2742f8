"""Demand of an exchange: each rank's queries with the pieces they see, in sequence positions.

All ranks derive the same demand, so sender and receiver agree. `rows` turns it into rows, `plan`
decides what is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sps2_mega.attention.csa.key_blocks import CSAPiece
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.attention.layout.token_layout import PrefillLayout, Run
from sps2_mega.attention.levels.exchanges import Exchange


@dataclass(frozen=True, slots=True)
class Demand:
    """Pieces of one run of queries, of some heads, in positions of its sequence.

    Pieces count KV heads from the first of `kv_heads`, whose query heads are `heads`. `key_run` is
    the first run that their keys are in.
    """

    run: Run
    key_run: Run
    heads: range
    kv_heads: range
    pieces: list[CSAPiece]


class ExchangeDemand:
    """Runs of one step's queries: all, the ones before the exact tails, and the tails."""

    def __init__(
        self,
        layout: PrefillLayout,
        patterns: Sequence[CSAPattern],
        tail_starts: Sequence[int],
        kv_heads: range,
    ) -> None:
        self._patterns, self._tail_starts, self._kv_heads = patterns, tail_starts, kv_heads
        self._ranks = range(len(layout.keys.counts))
        self._key_runs: dict[int, list[Run]] = {}
        for run in layout.keys.runs:
            self._key_runs.setdefault(run.sequence, []).append(run)
        self._runs: dict[str, list[list[Run]]] = {
            name: [[] for _ in self._ranks] for name in ("all", "body", "tail")
        }
        for run in layout.queries.runs:
            self._runs["all"][run.rank].append(run)
            cut = min(max(run.start, tail_starts[run.sequence]), run.end)
            for name, start, end in (("body", run.start, cut), ("tail", cut, run.end)):
                if start < end:
                    local = run.local_start + start - run.start
                    self._runs[name][run.rank].append(
                        Run(run.sequence, run.rank, start, end, local)
                    )

    def needs(self, exchange: Exchange) -> bool:
        """Tell whether any rank has queries for this exchange; all ranks agree."""
        return any(self._runs[exchange.queries])

    def of_rank(
        self,
        exchange: Exchange,
        at: int,
        layer: int,
        *,
        asking: int | None = None,
        holding: int | None = None,
    ) -> Iterator[Demand]:
        """Yield what rank `at` computes.

        `asking` restricts it to queries of one rank, `holding` to keys of one rank.
        """
        for a in self._ranks if asking is None else (asking,):
            for run in self._runs[exchange.queries][a]:
                pattern = self._patterns[run.sequence]
                for keys, key_run in self._key_ranges(exchange, at, run, holding):
                    for heads, kv_heads in exchange.heads(at):
                        pieces = csa_pieces(
                            pattern,
                            prompt_len=self._tail_starts[run.sequence] + pattern.tail,
                            queries=range(run.start, run.end),
                            keys=keys,
                            kv_heads=_shift(kv_heads, self._kv_heads.start),
                            layer=layer,
                        )
                        if pieces:
                            yield Demand(run, key_run, heads, kv_heads, pieces)

    def _key_ranges(
        self, exchange: Exchange, at: int, queries: Run, holding: int | None
    ) -> list[tuple[range, Run]]:
        """Return the positions before the end of a run of queries whose keys the exchange takes.

        Neighbouring runs are joined where a buffer is made of them.
        """
        found: list[tuple[range, Run]] = []
        for run in self._key_runs[queries.sequence]:
            if run.start >= queries.end:
                break
            if holding not in (None, run.rank) or not exchange.takes(at, queries.rank, run.rank):
                continue
            if found and self.brings_keys(exchange) and found[-1][0].stop == run.start:
                found[-1] = (range(found[-1][0].start, run.end), found[-1][1])
            else:
                found.append((range(run.start, run.end), run))
        return found

    def brings_keys(self, exchange: Exchange) -> bool:
        """Tell whether keys go into a buffer: keys from other ranks, and blocks of far keys."""
        return not exchange.keys_stay or any(pattern.block > 1 for pattern in self._patterns)


def _shift(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by, numbers.step)
