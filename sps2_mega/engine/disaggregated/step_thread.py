"""Thread that runs prefill steps, so that decoded tokens reach clients while a long prompt runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sps2_mega.comm.watchdog import Watchdog
from sps2_mega.engine.disaggregated.frames import Cut, Destinations
from sps2_mega.engine.disaggregated.prefill_rank import PrefillRank
from sps2_mega.engine.failing import failing
from sps2_mega.types import StepOutput, StepPlan


@dataclass(frozen=True, slots=True)
class StepDone:
    """A prefill step that has ended on this rank."""

    plan: StepPlan
    output: StepOutput


@dataclass(frozen=True, slots=True)
class _Step:
    plan: StepPlan
    destinations: Destinations


class StepThread:
    """Thread of prefill steps, one at a time; puts a StepDone into `events` after each."""

    def __init__(
        self,
        rank: PrefillRank,
        watchdog: Watchdog,
        device: torch.device,
        events: queue.SimpleQueue[Any],
    ) -> None:
        self._rank, self._watchdog, self._device, self._events = rank, watchdog, device, events
        self._steps: queue.SimpleQueue[_Step | Sequence[Cut] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sps2-prefill", daemon=True)
        self._thread.start()

    def begin(self, plan: StepPlan, destinations: Destinations) -> None:
        """Run a step. May be called again only after the step's StepDone."""
        self._steps.put(_Step(plan, destinations))

    def cut(self, cuts: Sequence[Cut]) -> None:
        """Cut these sequences, after the running step."""
        self._steps.put(cuts)

    def close(self) -> None:
        """End the thread, after everything that it was given to do."""
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        with failing(self._watchdog):
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # each thread has its own current device
            while (work := self._steps.get()) is not None:
                if isinstance(work, _Step):
                    output = self._rank.lead(work.plan, work.destinations)
                    self._events.put(StepDone(work.plan, output))
                else:
                    self._rank.cut(work)
