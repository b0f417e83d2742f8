"""Rank of the prefill pool: runs plans, and sends keys and values as layers complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sps2_mega.comm.collectives import broadcast_bytes
from sps2_mega.engine.disaggregated.control import Control
from sps2_mega.engine.disaggregated.frames import Cut, Destinations, decode_prefill, encode_prefill
from sps2_mega.engine.disaggregated.kv_sender import MAX_BATCHES, KVSender
from sps2_mega.engine.disaggregated.kv_transfer import (
    Destination,
    KVTransfer,
    plan_kv_transfers,
    repeated,
)
from sps2_mega.engine.failing import failing
from sps2_mega.engine.follower import SHUTDOWN
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.types import PrefillItem, StepOutput, StepPlan


class PrefillRank:
    """Any rank of the prefill pool: the driver calls `lead`, the others `run`, for each step."""

    def __init__(self, rank: StartedRank) -> None:
        assert rank.bridge is not None and len(rank.pools) == 2
        self._rank, self._executor = rank, rank.executor
        self._prefill_pool, self._decode_pool = rank.pools
        self.control = Control(rank)
        channel = rank.bridge.channel(
            on_message=_refuse_message, on_error=rank.watchdog.fail, max_batches=MAX_BATCHES
        )
        self._sender = KVSender(
            channel, rank.executor.pool, num_layers=rank.executor.config.num_layers
        )
        # The last pass of each sequence, until it has its token.
        self._passes: dict[int, tuple[PrefillItem, Destination]] = {}

    def lead(self, plan: StepPlan, destinations: Destinations) -> StepOutput:
        """Run a step on all prefill ranks; `destinations` are those of passes that begin here."""
        self._broadcast(encode_prefill(plan, destinations))
        return self._execute(plan, destinations)

    def cut(self, cuts: Sequence[Cut]) -> None:
        """Stop all prefill ranks from sending more of these sequences, after the last step."""
        self._broadcast(encode_prefill(None, {}, cuts))
        self._cut(cuts)

    def run(self) -> None:
        """Execute the driver's steps until it leaves."""
        with failing(self._rank.watchdog):
            while payload := broadcast_bytes(None, self._rank.groups.control):
                plan, destinations, cuts = decode_prefill(payload)
                if plan is not None:
                    self._execute(plan, destinations)
                self._cut(cuts)
        self._rank.leave()

    def dismiss(self) -> None:
        """Tell the other ranks that no step follows."""
        broadcast_bytes(SHUTDOWN, self._rank.groups.control)

    def _broadcast(self, frame: bytes) -> None:
        if self._rank.groups.control.size > 1:
            broadcast_bytes(frame, self._rank.groups.control)

    def _execute(self, plan: StepPlan, destinations: Destinations) -> StepOutput:
        self._rank.watchdog.step_begin(plan.step, plan.mode.name.lower())
        on_layer = None
        if plan.prefills:
            entering = {item.seq_id: (item, destinations[item.seq_id]) for item in plan.prefills}
            self._passes |= entering
            on_layer = self._sender.begin(self._transfers(list(entering.values()))).layer_done
        output = self._executor.execute(plan, on_layer=on_layer)
        sampled = [self._passes.pop(seq_id) for seq_id in plan.sampled]
        self._overwrite(
            [
                over
                for over, token_id in zip(sampled, output.token_ids, strict=True)
                if token_id is None
            ]
        )
        if self._rank.trace is not None:
            self._rank.trace.flush()
        self._rank.watchdog.step_end()
        return output

    def _overwrite(self, failed: list[tuple[PrefillItem, Destination]]) -> None:
        """Send failed sequences once more, all chunks at once, now that the executor has cleared
        them: values that are not finite must not stay in blocks of the decode pool."""
        if not failed:
            return
        again = [
            (
                replace(item, start=item.num_shared_tokens),
                replace(destination, handoff=repeated(destination.handoff)),
            )
            for item, destination in failed
        ]
        under_way = self._sender.begin(self._transfers(again))
        for layer in range(self._executor.config.num_layers):
            under_way.layer_done(layer)

    def _cut(self, cuts: Sequence[Cut]) -> None:
        for cut in cuts:
            self._passes.pop(cut.seq_id, None)
            self._sender.cut(cut.handoff, cut.ranks)

    def _transfers(self, items: list[tuple[PrefillItem, Destination]]) -> list[KVTransfer]:
        groups = self._rank.groups
        return plan_kv_transfers(
            items,
            prefill=self._prefill_pool,
            decode=self._decode_pool,
            sp_rank=groups.sp.rank,
            tp_rank=groups.tp.rank,
            num_kv_heads=self._executor.config.num_kv_heads,
            block_size=self._executor.pool.block_size,
        )


def _refuse_message(source: int, kind: int, detail: int, payload: object) -> None:
    raise AssertionError(f"rank {source} sent keys and values to a prefill rank")
