"""One prefill rank's part of a step: run the plan, and send keys and values to the decode ranks as layers complete."""

from __future__ import annotations

from sps2_mega.comm.collectives import broadcast_bytes
from sps2_mega.engine.disaggregated.control import Control
from sps2_mega.engine.disaggregated.frames import Destinations, decode_prefill, encode_prefill
from sps2_mega.engine.disaggregated.kv_sender import MAX_BATCHES, KVSender
from sps2_mega.engine.disaggregated.shipment import Shipment, plan_shipments
from sps2_mega.engine.startup import StartedRank, failing
from sps2_mega.mcore.init import finalize
from sps2_mega.types import PrefillItem, StepOutput, StepPlan

_SHUTDOWN = b""


class PrefillRank:
    """Any rank of the prefill side. The driver calls `lead`, the others `run_worker`, for the same steps."""

    def __init__(self, rank: StartedRank) -> None:
        assert rank.bridge is not None and len(rank.sides) == 2
        self._rank, self._executor = rank, rank.executor
        self._prefill_side, self._decode_side = rank.sides
        self.control = Control(rank)
        channel = rank.bridge.channel(
            on_message=_nobody_sends_here, on_error=rank.lifeline.fail, max_batches=MAX_BATCHES
        )
        self._sender = KVSender(channel, rank.executor.pool)

    def lead(self, plan: StepPlan, destinations: Destinations) -> StepOutput:
        """Runs a step on all prefill ranks. `destinations` are those of sequences whose pass begins with it."""
        if self._rank.groups.control.size > 1:
            broadcast_bytes(encode_prefill(plan, destinations), self._rank.groups.control)
        return self._execute(plan, destinations)

    def run_worker(self) -> None:
        """Executes the driver's steps until it leaves."""
        with failing(self._rank.lifeline):
            while payload := broadcast_bytes(None, self._rank.groups.control):
                self._execute(*decode_prefill(payload))
        self.leave()

    def dismiss(self) -> None:
        """The driver's last word to the others."""
        broadcast_bytes(_SHUTDOWN, self._rank.groups.control)

    def leave(self) -> None:
        """The end of this rank; all ranks of the job come here together."""
        rank = self._rank
        with failing(rank.lifeline):
            if rank.trace is not None:
                rank.trace.finish()
            assert rank.bridge is not None
            rank.bridge.close()
        rank.lifeline.close()
        finalize()

    def _execute(self, plan: StepPlan, destinations: Destinations) -> StepOutput:
        self._rank.lifeline.step_begin(plan.step, plan.mode.name.lower())
        under_way = self._sender.begin(self._shipments(plan.prefills, destinations))
        output = self._executor.execute(plan, on_layer=under_way.layer_done)
        self._overwrite_failed(plan, destinations, output)
        if self._rank.trace is not None:
            self._rank.trace.flush()
        self._rank.lifeline.step_end()
        return output

    def _overwrite_failed(
        self, plan: StepPlan, destinations: Destinations, output: StepOutput
    ) -> None:
        """Numbers that are not finite must not stay in blocks of the decode side: what the executor has cleared here
        is sent once more."""
        failed = {
            seq_id
            for seq_id, token_id in zip(plan.sampled, output.token_ids, strict=True)
            if token_id is None
        }
        if not failed:
            return
        items = [item for item in plan.prefills if item.seq_id in failed]
        again = self._sender.begin(self._shipments(items, destinations))
        for layer in range(self._executor.config.num_layers):
            again.layer_done(layer)

    def _shipments(self, items: list[PrefillItem], destinations: Destinations) -> list[Shipment]:
        groups = self._rank.groups
        return plan_shipments(
            [(item, destinations[item.seq_id]) for item in items],
            prefill=self._prefill_side,
            decode=self._decode_side,
            sp_rank=groups.sp.rank,
            tp_rank=groups.tp.rank,
            num_kv_heads=self._executor.config.num_kv_heads,
            block_size=self._executor.pool.block_size,
        )


def _nobody_sends_here(source: int, kind: int, detail: int, payload: object) -> None:
    raise AssertionError(f"rank {source} sent keys and values to a prefill rank")
