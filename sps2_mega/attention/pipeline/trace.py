"""Prefill steps of a rank as events of the Chrome trace format, which Perfetto reads.

One process row per rank. Thread rows: steps, `gather` and `scatter` (exchanges in flight, several
rows where they overlap, since events of one row must nest), and `compute` with the computations and
the waits between them. Times are microseconds of one clock for all ranks; `engine.startup.tracing`
compares clocks and writes files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sps2_mega.attention.pipeline.metrics import Interval
from sps2_mega.attention.pipeline.schedule import Phase, Stage

_STEP_ROW, _COMPUTE_ROW = 0, 1
# Rows of exchanges that overlap each other: gather 10, 11, ..; scatter 30, 31, ..
_FIRST_ROW = {Phase.GATHER: 10, Phase.SCATTER: 30}
_MAX_ROWS = 20


@dataclass(slots=True)
class TraceRecorder:
    """Events of one rank; its times plus `offset_s` are times of rank 0."""

    rank: int
    offset_s: float = 0.0
    _events: list[dict[str, Any]] = field(default_factory=list)
    _named: set[int] = field(default_factory=set)
    _row_ends: dict[int, float] = field(default_factory=dict)

    def step(self, name: str, span: Interval, **facts: Any) -> None:
        """Record a whole step; `facts` are shown with it."""
        self._add(name, "step", _STEP_ROW, span, **facts)

    def exchange(self, layer: int, stage: Stage, in_flight: Interval, blocked: Interval) -> None:
        """Record an exchange in flight and the wait for it, both in seconds."""
        first = _FIRST_ROW[stage.phase]
        rows = range(first, first + _MAX_ROWS)
        free = (row for row in rows if self._row_ends.get(row, in_flight[0]) <= in_flight[0])
        row = next(free, rows[-1])
        self._row_ends[row] = in_flight[1]
        name = _name(stage, layer)
        facts = {"layer": layer, "micro_batch": stage.micro_batch}
        self._add(name, stage.phase, row, in_flight, **facts)
        self._add(f"wait: {name}", "wait", _COMPUTE_ROW, blocked, **facts)

    def computed(self, layer: int, stage: Stage, span: Interval) -> None:
        """Record the computation of a micro-batch during `span`, in seconds."""
        facts = {"layer": layer, "micro_batch": stage.micro_batch}
        self._add(_name(stage, layer), stage.phase, _COMPUTE_ROW, span, **facts)

    def take_events(self) -> list[dict[str, Any]]:
        """Return the events since the last call; names of rows precede their first event."""
        new, self._events = self._events, []
        labels: list[dict[str, Any]] = []
        if not self._named:
            labels.append(self._label("process_name", 0, {"name": f"rank {self.rank}"}))
            labels.append(self._label("process_sort_index", 0, {"sort_index": self.rank}))
        for row in sorted({event["tid"] for event in new} - self._named):
            labels.append(self._label("thread_name", row, {"name": _row_name(row)}))
            labels.append(self._label("thread_sort_index", row, {"sort_index": row}))
            self._named.add(row)
        # Events of a row in the order of time, an outer one before the ones inside it.
        return labels + sorted(new, key=lambda event: (event["ts"], -event["dur"]))

    def _add(self, name: str, category: str, row: int, span: Interval, **facts: Any) -> None:
        self._events.append(
            {
                "name": name,
                "cat": str(category),
                "ph": "X",
                "pid": self.rank,
                "tid": row,
                "ts": round((span[0] + self.offset_s) * 1e6, 3),
                "dur": round(max(0.0, span[1] - span[0]) * 1e6, 3),
                "args": facts,
            }
        )

    def _label(self, name: str, row: int, facts: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "ph": "M", "pid": self.rank, "tid": row, "args": facts}


def _name(stage: Stage, layer: int) -> str:
    what = stage.part or ("out" if stage.phase is Phase.SCATTER else "attention")
    return f"{what} L{layer} m{stage.micro_batch}"


def _row_name(row: int) -> str:
    if row in (_STEP_ROW, _COMPUTE_ROW):
        return "steps" if row == _STEP_ROW else "compute"
    phase = Phase.GATHER if row < _FIRST_ROW[Phase.SCATTER] else Phase.SCATTER
    number = row - _FIRST_ROW[phase]
    return str(phase) if number == 0 else f"{phase} ({number + 1})"
