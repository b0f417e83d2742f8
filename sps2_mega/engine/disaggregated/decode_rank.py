"""Rank of the decode pool: decodes, and admits sequences whose keys other ranks send."""

from __future__ import annotations

from collections.abc import Sequence

from sps2_mega.comm.collectives import broadcast_bytes
from sps2_mega.engine.disaggregated.control import Control, Received
from sps2_mega.engine.disaggregated.frames import decode_decode, encode_decode
from sps2_mega.engine.disaggregated.kv_receiver import KVReceiver
from sps2_mega.engine.disaggregated.messages import Arrived
from sps2_mega.engine.failing import failing
from sps2_mega.engine.follower import SHUTDOWN
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.scheduler.decode_scheduler import Change
from sps2_mega.types import StepOutput, StepPlan


class DecodeRank:
    """Any rank of the decode pool: the driver calls `lead`, the others `run`, for each step."""

    def __init__(self, rank: StartedRank) -> None:
        assert rank.bridge is not None and len(rank.pools) == 2
        self._rank, self._executor, self._global_rank = rank, rank.executor, rank.bridge.rank
        self._driver = rank.pool.first
        self.control = Control(rank)
        receiver = KVReceiver(
            rank.executor.pool,
            num_layers=rank.executor.config.num_layers,
            num_senders=rank.pools[0].size,
            on_arrival=self._report_arrival,
        )
        rank.bridge.channel(on_message=receiver.receive, on_error=rank.watchdog.fail)

    def lead(self, plan: StepPlan, changes: Sequence[Change]) -> StepOutput:
        """Run a step on all decode ranks, after `changes`."""
        if self._rank.groups.control.size > 1:
            broadcast_bytes(encode_decode(plan, changes), self._rank.groups.control)
        return self._execute(plan, changes)

    def run(self) -> None:
        """Execute the driver's steps until it leaves."""
        with failing(self._rank.watchdog):
            while payload := broadcast_bytes(None, self._rank.groups.control):
                self._execute(*decode_decode(payload))
        self._rank.leave()

    def dismiss(self) -> None:
        """Tell the other ranks that no step follows."""
        broadcast_bytes(SHUTDOWN, self._rank.groups.control)

    def _execute(self, plan: StepPlan, changes: Sequence[Change]) -> StepOutput:
        self._rank.watchdog.step_begin(plan.step, "decode")
        for change in changes:
            if isinstance(change, int):
                self._executor.forget([change])
            else:
                self._executor.enter(change)
        output = self._executor.execute(plan)
        self._rank.watchdog.step_end()
        return output

    def _report_arrival(self, handoff: int) -> None:
        """Report a complete handoff. Runs in the receiving thread."""
        if self._global_rank == self._driver:
            self.control.events.put(Received(self._global_rank, Arrived(handoff)))
        else:
            self.control.send(self._driver, Arrived(handoff))
