"""Steps on any rank of a job without decode ranks, and the loop of a rank that takes no requests.

rank 0          plan -> broadcast -> execute_step -> commit      (`engine.engine`)
other ranks             broadcast -> execute_step, until an empty broadcast
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sps2_mega.comm.collectives import broadcast_bytes
from sps2_mega.engine.failing import failing
from sps2_mega.scheduler.plan_codec import decode
from sps2_mega.types import ForwardMode, StepOutput, StepPlan

if TYPE_CHECKING:
    from sps2_mega.engine.startup.start_rank import StartedRank
    from sps2_mega.worker.executor import Launched

SHUTDOWN = b""


class Follower:
    """Executes the driver's plans, in the driver's order, until it shuts down."""

    def __init__(self, rank: StartedRank) -> None:
        self._rank = rank

    def run(self) -> None:
        """Follow the driver to the end of the job, then leave it."""
        with failing(self._rank.watchdog):
            while payload := broadcast_bytes(None, self._rank.groups.control):
                execute_step(self._rank, decode(payload))
        self._rank.leave()


def execute_step(rank: StartedRank, plan: StepPlan, launched: Launched | None = None) -> StepOutput:
    """Run this rank's part of a step, or finish what was launched of it.

    The watchdog follows the step meanwhile; its prefill events are in the trace afterwards.
    """
    rank.watchdog.step_begin(plan.step, plan.mode.name.lower())
    if launched is None:
        output = rank.executor.execute(plan)
    else:
        output = rank.executor.finish(launched)
    if plan.mode is not ForwardMode.DECODE and rank.trace is not None:
        rank.trace.flush()
    rank.watchdog.step_end()
    return output
