"""Requests drawn from ServeGen's statistics of one client, window by window.

    *-trace.csv     start, requests per second, CV, distribution of gaps (Gamma, Weibull or none),
                    shape, scale
    *-dataset.json  {start: {"input_tokens": "{length: probability, ..}", "output_tokens": ..}}

Lengths have longer windows than arrivals.
"""

from __future__ import annotations

import ast
import json
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts; `cumulative` weights need not end at 1."""

    tokens: tuple[int, ...]
    cumulative: tuple[float, ...]

    def draw(self, source: random.Random) -> int:
        return source.choices(self.tokens, cum_weights=self.cumulative)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Seconds [start_s, end_s) in which gaps between requests follow one distribution.

    Without `gaps` no requests arrive.
    """

    start_s: float
    end_s: float
    gaps: tuple[str, float, float] | None
    inputs: Lengths
    outputs: Lengths


def read_windows(lines: Iterable[str], dataset: str, where: str) -> list[Window]:
    """Parse one client's statistics.

    Raises:
        ConfigError: a row or the dataset is not in ServeGen's form.
    """
    try:
        rows = [line.split(",") for line in lines if line.strip()]
        lengths = {
            float(start): (_lengths(entry["input_tokens"]), _lengths(entry["output_tokens"]))
            for start, entry in json.loads(dataset).items()
        }
        starts = [float(row[0]) for row in rows]
        width = starts[1] - starts[0] if len(starts) > 1 else 600.0
        windows = []
        for start, row in zip(starts, rows, strict=True):
            inputs, outputs = lengths[_last_before(sorted(lengths), start)]
            gaps = (row[3], float(row[4]), float(row[5])) if row[3] else None
            if gaps is not None and gaps[0] not in ("Gamma", "Weibull"):
                raise ValueError(f"gaps follow {gaps[0]!r}, neither Gamma nor Weibull")
            windows.append(
                Window(
                    start_s=start, end_s=start + width, gaps=gaps, inputs=inputs, outputs=outputs
                )
            )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"{where} is not a ServeGen client: {error!r}") from None
    return windows


def draw_arrivals(windows: Sequence[Window], *, seed: int) -> Iterator[Arrival]:
    """Draw requests in order of time, the first at 0; a seed always draws the same ones."""
    source = random.Random(seed)
    begin: float | None = None
    for window in windows:
        if window.gaps is None:
            continue
        name, shape, scale = window.gaps
        time_s = window.start_s
        while True:
            if name == "Gamma":
                time_s += source.gammavariate(shape, scale)
            else:
                time_s += source.weibullvariate(scale, shape)
            if time_s >= window.end_s:
                break
            begin = time_s if begin is None else begin
            yield Arrival(
                time_s=time_s - begin,
                prompt_len=max(1, window.inputs.draw(source)),
                output_len=max(1, window.outputs.draw(source)),
            )


def _lengths(text: str) -> Lengths:
    # A Python literal in a string: upstream evaluates it, which would run whatever a file says.
    table = ast.literal_eval(text)
    if not table:
        raise ValueError("no lengths")
    return Lengths(tuple(map(int, table)), tuple(accumulate(map(float, table.values()))))


def _last_before(starts: Sequence[float], time_s: float) -> float:
    return starts[max(0, bisect_right(starts, time_s) - 1)]
