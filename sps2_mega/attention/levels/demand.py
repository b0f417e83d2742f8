"""Who asks for what in a work: each rank's queries with the pieces that they see, in positions of
their sequences.

The same on all ranks, so that sender and receiver agree. Which rows follow is `work_rows`', what is
sent `work_plan`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sps2_mega.attention.csa.key_blocks import CSAPiece
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.attention.layout.token_layout import PrefillLayout, Run
from sps2_mega.attention.levels.exchanges import Work


@dataclass(frozen=True, slots=True)
class Demand:
    """Pieces of one run of queries, of some heads, in positions of its sequence. Pieces count KV
    heads from `kv_heads`, whose query heads are `heads`. `key_run` is the first run that their keys
    are in."""

    run: Run
    key_run: Run
    heads: range
    kv_heads: range
    pieces: list[CSAPiece]


class ExchangeDemand:
    """The runs of one step's queries, all of them, those before the exact tails and those of the
    tails."""

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

    def needs(self, work: Work) -> bool:
        """Whether any rank has queries for this work: the same on all ranks."""
        return any(self._runs[work.queries])

    def asked(
        self,
        work: Work,
        at: int,
        layer: int,
        *,
        asking: int | None = None,
        holding: int | None = None,
    ) -> Iterator[Demand]:
        """What rank `at` computes: of queries of all ranks or of `asking`, against keys of all or
        of `holding`."""
        for a in self._ranks if asking is None else (asking,):
            for run in self._runs[work.queries][a]:
                pattern = self._patterns[run.sequence]
                for keys, key_run in self._key_ranges(work, at, run, holding):
                    for heads, kv_heads in work.heads(at):
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
        self, work: Work, at: int, queries: Run, holding: int | None
    ) -> list[tuple[range, Run]]:
        """Positions before the end of a run of queries whose keys the work takes; neighbouring runs
        are joined where a buffer is made of them."""
        found: list[tuple[range, Run]] = []
        for run in self._key_runs[queries.sequence]:
            if run.start >= queries.end:
                break
            if holding not in (None, run.rank) or not work.takes(at, queries.rank, run.rank):
                continue
            if found and self.brings_keys(work) and found[-1][0].stop == run.start:
                found[-1] = (range(found[-1][0].start, run.end), found[-1][1])
            else:
                found.append((range(run.start, run.end), run))
        return found

    def brings_keys(self, work: Work) -> bool:
        """Whether keys are brought together in a buffer: such as come from elsewhere, and blocks of
        far keys."""
        return not work.keys_stay or any(pattern.block > 1 for pattern in self._patterns)


def _shift(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by, numbers.step)
