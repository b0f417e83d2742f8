"""Prefill passes between two of their slices, and whether they will be completed."""

from __future__ import annotations

from collections.abc import Container

from sps2_mega.types import StepPlan


class OpenPasses:
    """Follows the plans of passes that run in slices of layers; no other passes stay open."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._members: dict[int, set[int]] = {}  # sequences by pass

    def planned(self, plan: StepPlan) -> None:
        """Record the next step."""
        for pass_id in plan.dropped:
            self._members.pop(pass_id, None)
        if plan.layers is None:
            return
        if plan.prefills:
            self._members[plan.layers.pass_id] = {item.seq_id for item in plan.prefills}
        if plan.layers.end == self._num_layers:
            self._members.pop(plan.layers.pass_id, None)

    def goes_on(self, seq_id: int, alive: Container[int]) -> bool:
        """Whether the open pass of an ended sequence is completed, for another one in `alive`."""
        members = next((m for m in self._members.values() if seq_id in m), set())
        return any(member in alive for member in members)
