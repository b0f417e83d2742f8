"""Steps of policy `sarathi`: all running decodes, filled up with chunks of prompts.

The policy is that of Sarathi-Serve (arXiv 2403.02310).
"""

from __future__ import annotations

from sps2_mega.config import SchedulerConfig
from sps2_mega.scheduler.decode_steps import DecodeSteps
from sps2_mega.scheduler.sequence_states import SequenceStates
from sps2_mega.types import DecodeItem, PrefillItem, Sequence


class HybridSteps:
    """A step has at most `chunk_tokens` tokens, unless more sequences decode."""

    def __init__(
        self, config: SchedulerConfig, states: SequenceStates, decodes: DecodeSteps
    ) -> None:
        self._config, self._states, self._decodes = config, states, decodes

    def plan(self, now: float) -> tuple[list[PrefillItem], list[DecodeItem]]:
        """All running decodes, and as much of prompts as the step's token budget leaves."""
        num_waiting = len(self._states.waiting)
        decodes = self._decodes.plan()
        preempting = len(self._states.waiting) > num_waiting
        budget = self._config.chunk_tokens - len(decodes)
        items: list[PrefillItem] = []
        for sequence in self._states.prefilling:
            if budget > 0:
                items.append(self._chunk(sequence, budget))
                budget -= items[-1].num_new_tokens
        if not preempting and budget > 0:
            waiting = list(self._states.waiting.values())
            for sequence, prefix in self._states.newcomers(waiting, self._config.max_running):
                if not self._states.admit(sequence, prefix, now):
                    break
                items.append(self._chunk(sequence, budget))
                budget -= items[-1].num_new_tokens
                if budget <= 0:
                    break
        return items, decodes

    def _chunk(self, sequence: Sequence, budget: int) -> PrefillItem:
        item = self._states.next_chunk(sequence, budget)
        self._states.computed(item)
        return item
