"""One more token for each running sequence: positions, new blocks, preemption.

Decides nothing about when sequences decode (`scheduler`) nor the rank of a new block (`kv_cache`).
"""

from __future__ import annotations

from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.scheduler.prefill_queue import PrefillQueue
from sps2_mega.scheduler.sequence_states import SequenceStates
from sps2_mega.types import DecodeItem


class DecodeSteps:
    """The oldest sequence never gives up blocks to a younger one."""

    def __init__(self, states: SequenceStates, ledger: BlockLedger, prefills: PrefillQueue) -> None:
        self._states, self._ledger, self._prefills = states, ledger, prefills

    def plan(self) -> list[DecodeItem]:
        """Next token of every sequence that is not prefilling; some may be preempted instead."""
        items = []
        # Oldest first, so that it is never preempted for a younger one.
        for seq_id in list(self._states.running):
            sequence = self._states.running.get(seq_id)
            if sequence is None:
                break  # preempted in this loop, like all younger ones
            if self._states.is_prefilling(seq_id):
                continue
            position = sequence.num_tokens - 1
            new_block = None
            if position == self._ledger.table(seq_id).capacity:
                new_block = self._grow_or_preempt(seq_id)
                if new_block is None:
                    break
            items.append(DecodeItem(seq_id, sequence.output_token_ids[-1], position, new_block))
        return items

    def _grow_or_preempt(self, seq_id: int) -> tuple[int, int] | None:
        """A new block, taken from the youngest if need be; None if `seq_id` is the youngest."""
        while True:
            new_block = self._ledger.grow(seq_id)
            if new_block is not None:
                return new_block
            # Alone in the cache a sequence always finds a block: `Limits.max_len` ends it before.
            assert len(self._states.running) > 1, f"sequence {seq_id} outgrew the KV cache"
            youngest = next(reversed(self._states.running))
            if not self._prefills.preempt(youngest):
                self._states.preempt(youngest)
            if youngest == seq_id:
                return None
