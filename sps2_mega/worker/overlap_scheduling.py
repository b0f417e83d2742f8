"""Overlap of host and device on one rank: step k+1 is launched before the answers of step k.

Stop strings, text and clients' answers take the host about as long as planning does; the device
works meanwhile:

    host     wait k | commit k, plan and launch k+1 | answers of k | wait k+1 | commit k+1 ...
    device   k -----|                               k+1 -----------------------|

Nothing is guessed: the tokens of step k are known when k+1 is planned. Only a stop string is found
too late to keep its sequence out of step k+1; the scheduler drops that token, as after an abort. A
step that cannot be launched (a prefill, which would delay the answers) is planned and waits for the
next call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sps2_mega.types import StepPlan

if TYPE_CHECKING:
    from sps2_mega.worker.executor import Executor, Launched


@dataclass(frozen=True, slots=True)
class Begun:
    """A planned step, and the device's work on it if it was launched."""

    plan: StepPlan
    launched: Launched | None


class OverlapScheduler:
    """At most one step is begun; none without graphs, where launching takes as long as running."""

    def __init__(self, executor: Executor, plan: Callable[[], StepPlan | None]) -> None:
        self._executor, self._plan = executor, plan
        self._begun: Begun | None = None

    @property
    def has_begun(self) -> bool:
        return self._begun is not None

    def take(self) -> Begun | None:
        """Take the step that was begun; the caller finishes it."""
        begun, self._begun = self._begun, None
        return begun

    def begin_next(self) -> None:
        """Plan the next step, and launch it if possible. Call when the last step is committed."""
        assert self._begun is None, "the step that was begun was not taken"
        if not self._executor.has_graphs:
            return
        plan = self._plan()
        if plan is not None:
            launches = self._executor.can_launch(plan)
            self._begun = Begun(plan, self._executor.launch(plan) if launches else None)
