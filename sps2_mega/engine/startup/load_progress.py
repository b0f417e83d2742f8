"""Progress of a start on rank 0: one line per stage with the seconds so far, and the weights read.

    [   0.4 s] waiting for 3 other ranks
    [   2.1 s] reading the weights of llama-3-8b
    [   7.1 s] 31 % of 16.1 GB, 1.00 GB/s, about 11 s left

On a terminal the last line is a bar that moves. Decides nothing about the start itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

_LINE_EVERY_S = 5.0
_STAGE_EVERY_S = 0.5


class LoadProgress:
    """Shows stages where `show` is set; `on_stage` is called in any case, for a server's status."""

    def __init__(
        self,
        *,
        show: bool,
        on_stage: Callable[[str], None] | None = None,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stream` defaults to standard error; `clock` returns seconds."""
        self._stream = (sys.stderr if stream is None else stream) if show else None
        self._on_stage = on_stage
        self._clock = clock
        self._began = clock()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start began."""
        return self._clock() - self._began

    def stage(self, text: str) -> None:
        """Begin a new stage of the start."""
        if self._on_stage is not None:
            self._on_stage(text)
        self._line(text)

    @contextmanager
    def reading(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Stage in which weights are read; yield a callback for bytes read and bytes in all."""
        stage = f"reading the weights of {name}"
        self.stage(stage)
        if self._stream is not None and self._stream.isatty():
            with self._bar(name) as show:
                yield self._with_updates(stage, show)
        else:
            yield self._with_updates(stage, self._lines())

    def _with_updates(
        self, stage: str, show: Callable[[int, int], None]
    ) -> Callable[[int, int], None]:
        due = self._clock() + _STAGE_EVERY_S

        def on_bytes(done: int, total: int) -> None:
            nonlocal due
            show(done, total)
            if self._on_stage is not None and self._clock() >= due:
                due = self._clock() + _STAGE_EVERY_S
                self._on_stage(f"{stage}: {_share(done, total)}")

        return on_bytes

    def _lines(self) -> Callable[[int, int], None]:
        began = self._clock()
        due = began + _LINE_EVERY_S

        def on_bytes(done: int, total: int) -> None:
            nonlocal due
            now = self._clock()
            if now < due or done >= total:
                return
            due = now + _LINE_EVERY_S
            rate = done / (now - began)
            left = (total - done) / rate
            self._line(f"{_share(done, total)}, {rate / 1e9:.2f} GB/s, about {left:.0f} s left")

        return on_bytes

    @contextmanager
    def _bar(self, name: str) -> Iterator[Callable[[int, int], None]]:
        from tqdm import tqdm

        with tqdm(
            desc=f"loading {name}", unit="B", unit_scale=True, leave=False, file=self._stream
        ) as bar:

            def on_bytes(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield on_bytes

    def _line(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(f"[{self.elapsed_s:6.1f} s] {text}\n")
            self._stream.flush()


def _share(done: int, total: int) -> str:
    return f"{100 * done / total:.0f} % of {total / 1e9:.2f} GB"
