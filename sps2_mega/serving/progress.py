"""Progress display of a batch run, and its closing table.

On a terminal it is a bar; elsewhere (a log file, a launcher that interleaves ranks) one plain line
every few seconds. It decides nothing about the run.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import IO, Protocol

from tqdm import tqdm

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.metrics import DurationHistogram, StepMeter
from sps2_mega.outputs import RequestOutput

_PLAIN_INTERVAL = 5.0


class Snapshot(Protocol):
    """The engine's counts; tokens and seconds are cumulative, `kv_usage` is in [0, 1]."""

    num_running: int
    num_waiting: int
    kv_usage: float
    prompt_tokens: int
    output_tokens: int
    prefill_comm: CommSeconds


@dataclass(slots=True)
class RunTotals:
    """Counts of one run, for the closing table."""

    began: float = field(default_factory=time.monotonic)
    num_ok: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: StepMeter = field(default_factory=StepMeter)
    prefill_comm: CommSeconds = field(default_factory=CommSeconds)
    ttft: DurationHistogram = field(default_factory=DurationHistogram)
    tbt: DurationHistogram = field(default_factory=DurationHistogram)

    def add(self, output: RequestOutput) -> None:
        if output.error is not None:
            self.num_failed += 1
            return
        self.num_ok += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        for completion in output.completions:
            self.output_tokens += len(completion.token_ids)
            if completion.token_ids:
                self.ttft.add(completion.timings.ttft_s)
            for gap in completion.timings.gaps_s:
                self.tbt.add(gap)

    def table(self) -> str:
        """The closing table, several lines."""
        rows = [
            ("requests ok", f"{self.num_ok:,}"),
            ("requests failed", f"{self.num_failed:,}"),
            ("prompt tokens", f"{self.prompt_tokens:,}"),
            ("output tokens", f"{self.output_tokens:,}"),
            ("wall time", f"{time.monotonic() - self.began:.2f} s"),
            ("prefill", f"{self.steps.prefill_rate:,.1f} tokens/s"),
            ("decode", f"{self.steps.decode_rate:,.1f} tokens/s"),
            *self._comm_rows(),
            ("TTFT p50 / p99", _percentiles(self.ttft)),
            ("TBT p50 / p99", _percentiles(self.tbt)),
        ]
        width = max(len(name) for name, _ in rows)
        values = max(len(value) for _, value in rows)
        rule = "-" * (width + values + 3)
        return "\n".join([rule, *(f"{name:<{width}} | {value}" for name, value in rows), rule])

    def _comm_rows(self) -> list[tuple[str, str]]:
        """Rows about communication; none if ranks do not communicate."""
        comm = self.prefill_comm
        if comm.total_comm_s == 0:
            return []
        waited = f"{comm.exposed_comm_s:.2f} of {comm.total_comm_s:.2f} s"
        return [("prefill waits for data", f"{waited} ({comm.overlap:.0%} hidden)")]


class Progress:
    """One bar, or one line every 5 s, over `total` requests; call `step` after each engine step."""

    def __init__(self, total: int, totals: RunTotals, *, stream: IO[str] | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._totals = total, totals
        self._last: Snapshot | None = None
        self._next_line = time.monotonic() + _PLAIN_INTERVAL
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, unit="req", file=self._stream, dynamic_ncols=True)

    def step(self, stats: Snapshot, seconds: float) -> None:
        """Record the engine's counts after a step that took `seconds`."""
        before = self._last
        self._totals.steps.record(
            prompt_tokens=stats.prompt_tokens - (before.prompt_tokens if before else 0),
            output_tokens=stats.output_tokens - (before.output_tokens if before else 0),
            seconds=seconds,
        )
        self._totals.prefill_comm = stats.prefill_comm
        self._last = stats
        self._show()

    def message(self, text: str) -> None:
        """Write a line on stdout without breaking the bar."""
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._show(force=True)
            self._bar.close()

    def _show(self, *, force: bool = False) -> None:
        done = self._totals.num_ok + self._totals.num_failed
        if self._bar is not None:
            self._bar.set_postfix_str(self._state(), refresh=False)
            self._bar.update(done - self._bar.n)
            if force:
                self._bar.refresh()
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _PLAIN_INTERVAL
            percent = 100 * done / self._total if self._total else 100.0
            elapsed = time.monotonic() - self._totals.began
            self._stream.write(
                f"{done}/{self._total} requests ({percent:.0f} %) in {elapsed:.0f} s, "
                f"{self._state()}\n"
            )
            self._stream.flush()

    def _state(self) -> str:
        steps, last = self._totals.steps, self._last
        comm = self._totals.prefill_comm
        hidden = f" ({comm.overlap:.0%} of communication hidden)" if comm.total_comm_s else ""
        rates = (
            f"prefill {steps.prefill_rate:,.0f} tok/s{hidden}, "
            f"decode {steps.decode_rate:,.0f} tok/s"
        )
        if last is None:
            return rates
        return (
            f"{rates}, {last.num_running} running, {last.num_waiting} waiting, "
            f"KV {last.kv_usage:.0%}"
        )


def _percentiles(histogram: DurationHistogram) -> str:
    low, high = histogram.percentile(50), histogram.percentile(99)
    if low is None or high is None:
        return "-"
    return f"{1000 * low:,.1f} / {1000 * high:,.1f} ms"
