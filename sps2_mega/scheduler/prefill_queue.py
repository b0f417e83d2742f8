"""Groups of admitted prompts under prefill, and which of them runs next.

Requests that wait for room are `SequenceStates.waiting`.

The scheduler decides between prefill and decode, `prefill_slices` how far a slice reaches,
`step_times` predicts seconds. Without predictions every group runs through the model in one step,
first come first served.

The key of a prompt or group is arrival time + `overtake` * expected seconds of prefill left; the
least key runs first. Keys do not grow with waiting, so a prompt that arrives later than another's
key does not overtake it: nothing starves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, islice

from sps2_mega import types
from sps2_mega.config import SchedulerConfig
from sps2_mega.scheduler.chunk_bounds import chunk_lengths
from sps2_mega.scheduler.prefill_group import PrefillGroup
from sps2_mega.scheduler.prefill_slices import left_s, slice_within
from sps2_mega.scheduler.prompt_placement import PromptPlacement
from sps2_mega.scheduler.sequence_states import SequenceStates
from sps2_mega.scheduler.step_times import StepTimeModel
from sps2_mega.types import LayerSlice, PrefillItem

# Groups in progress at a time: a long one, one that overtakes it, one that overtakes both. Each
# keeps hidden states.
MAX_GROUPS = 3
# Factor in favour of waiting: computing again delays every request, waiting only one. It also keeps
# equal prompts together whatever the measurements.
_PATIENCE = 2.0


class PrefillQueue:
    """Admitted prompts in groups; every prefilling or held sequence is in exactly one group."""

    def __init__(
        self,
        config: SchedulerConfig,
        states: SequenceStates,
        placement: PromptPlacement,
        step_times: StepTimeModel | None,
    ) -> None:
        self._config, self._states, self._placement, self._step_times = (
            config,
            states,
            placement,
            step_times,
        )
        self._groups: list[PrefillGroup] = []
        self._finished: list[int] = []  # held ids whose last slice is in the plan being made
        self._dropped: list[int] = []
        self._num_passes = 0
        self._running: tuple[PrefillGroup, LayerSlice] | None = None  # what is planned

    def next_slice(
        self, now: float, room_s: float, layer_room_s: float
    ) -> tuple[list[PrefillItem], LayerSlice | None] | None:
        """Items and layers of the next step, as in StepPlan; None where there are no prefills.

        The step should take `room_s` seconds at most, a layer `layer_room_s`.
        """
        group = self._choose(now, layer_room_s)
        if group is None:
            return None
        if not group.items:
            self._num_passes += 1
            group.begin_pass(self._num_passes, self._items(group))
        items, entering = group.items, not group.is_under_way
        if self._step_times is None:
            self._end_pass(group)
            return items, None
        planned = slice_within(group, self._step_times, room_s)
        self._running = group, planned
        if planned.end < self._step_times.layer_flops.num_layers:
            group.next_layer, group.next_token = planned.end, planned.end_token
            self._states.hold(item.seq_id for item in items)
            return items if entering else [], planned
        self._end_pass(group)
        if entering:
            return items, None
        sampled = tuple(item.seq_id for item in items)
        return [], replace(planned, sampled=sampled)

    def planned(self) -> list[int]:
        """Close the plan, its released sequences included; return the passes that ranks forget."""
        self._states.let_go(self._finished)
        self._finished = []
        dropped, self._dropped = self._dropped, []
        return dropped

    def executed(self, seconds: float) -> None:
        """Record the seconds of the step with the last slice."""
        if self._running is None or self._step_times is None:
            return
        group, planned = self._running
        self._running = None
        if planned.chunked:
            (item,) = group.items
            self._step_times.computed_chunks(planned.chunks(item.start, item.end), seconds)
            return
        group.layer_s = seconds / (planned.end - planned.first)
        self._step_times.computed(group.flops(self._step_times.layer_flops), group.layer_s)

    def ended(self, seq_id: int) -> None:
        """Forget a sequence that is over, and its group with the last member."""
        group = self._group_of(seq_id)
        if group is not None and not any(map(self._states.is_prefilling, group.seq_ids)):
            self._drop(group)

    def preempt(self, seq_id: int) -> bool:
        """Send the group of a prefilling sequence back to the queue; False where it has none."""
        group = self._group_of(seq_id)
        if group is None:
            return False
        self._drop(group)
        for member in reversed(group.seq_ids):
            if self._states.is_prefilling(member):
                self._states.preempt(member)
        return True

    def check_integrity(self) -> None:
        """Check that each prefilling sequence is in one group.

        Raises:
            AssertionError: one is lost or in two groups.
        """
        members = [member for group in self._groups for member in group.seq_ids]
        assert len(members) == len(set(members)), "a sequence is in two prefill groups"
        prefilling = {sequence.seq_id for sequence in self._states.prefilling}
        assert prefilling <= set(members), "a prefilling sequence is in no group"
        for group in self._groups:
            assert prefilling & set(group.seq_ids), "a prefill group without sequences"

    def _choose(self, now: float, layer_room_s: float) -> PrefillGroup | None:
        first = min(self._groups, key=self._key, default=None)
        if len(self._groups) < MAX_GROUPS and self._states.has_room(self._config.max_running):
            key = math.inf if first is None else self._key(first)
            formed = self._form(now, layer_room_s, key)
            if formed is not None:
                self._groups.append(formed)
                return formed
        return first

    def _form(self, now: float, layer_room_s: float, before: float) -> PrefillGroup | None:
        """A group of waiting prompts whose keys, and its own, are less than `before`: as many as
        one step may take, or one of any length."""
        members: list[types.Sequence] = []
        budget, num_new = float(self._config.max_prefill_tokens), 0
        load = [0] * self._placement.sp_size
        group_s = 0.0
        order = list(islice(self._order(), self._config.max_running))
        longest_whole = self._placement.longest_whole(
            (sequence.num_tokens for sequence in order), self._config.max_prefill_tokens
        )
        for sequence, prefix in self._states.newcomers(
            order, self._config.max_running, self._worth_waiting
        ):
            start = self._placement.num_shared(prefix)
            missing = sequence.num_tokens - start
            seconds = self._prompt_s(start, sequence.num_tokens)
            oldest = min([sequence.arrival_time, *(other.arrival_time for other in members)])
            late = self._weighted(oldest, group_s + seconds) >= before
            if late or self._weighted(sequence.arrival_time, seconds) >= before:
                break
            chunks = self._chunks(start, sequence.num_tokens, layer_room_s)
            if members and (chunks is not None or num_new + missing > budget):
                break
            spread = self._placement.spread(
                sequence, prefix, load, chunks=chunks, longest_whole=longest_whole
            )
            if not self._states.admit(sequence, prefix, now, spread):
                break
            members.append(sequence)
            num_new, group_s = num_new + missing, group_s + seconds
            if chunks is not None:
                return PrefillGroup(
                    members=members, cuts=list(accumulate(chunks, initial=start))[1:]
                )
            if spread.rank is not None:
                load[spread.rank] += missing
            budget = min(budget, self._tokens_within(layer_room_s))
            if num_new >= budget:
                break
        return PrefillGroup(members=members) if members else None

    def _order(self) -> Iterable[types.Sequence]:
        waiting = list(self._states.waiting.values())
        if self._step_times is None or not self._config.overtake:
            return waiting
        return sorted(
            waiting, key=lambda s: self._weighted(s.arrival_time, self._prompt_s(0, s.num_tokens))
        )

    def _key(self, group: PrefillGroup) -> float:
        return self._weighted(group.arrival_time, self._left_s(group))

    def _left_s(self, group: PrefillGroup) -> float:
        assert self._step_times is not None, "groups stay only where they are interrupted"
        return left_s(group, self._step_times)

    def _worth_waiting(self, filler: types.Sequence, start: int, end: int) -> bool:
        """Whether to wait for a prefix that `filler` computes.

        Not for a long prompt that is interrupted, if it takes far longer than to compute the shared
        tokens again.
        """
        group = self._group_of(filler.seq_id)
        return group is None or self._left_s(group) <= _PATIENCE * self._prompt_s(start, end)

    def _weighted(self, arrival_time: float, seconds: float) -> float:
        return arrival_time + self._config.overtake * seconds

    def _prompt_s(self, start: int, end: int) -> float:
        return 0.0 if self._step_times is None else self._step_times.prompt_s(start, end)

    def _chunks(self, start: int, end: int, layer_room_s: float) -> Sequence[int] | None:
        """Tokens of the chunks that a prompt's layers are cut into; None where a layer is short."""
        if self._step_times is None:
            return None
        least = self._placement.least_chunk
        if self._step_times.tokens_within(layer_room_s, start, end, least) == end - start:
            return None
        return chunk_lengths(
            self._step_times,
            start,
            end,
            layer_room_s,
            unit=self._placement.unit,
            at_first=least,
        )

    def _tokens_within(self, layer_room_s: float) -> float:
        """Tokens of short prompts that one layer may have."""
        if self._step_times is None:
            return math.inf
        most = self._config.max_prefill_tokens
        return self._step_times.tokens_within(layer_room_s, 0, most, self._placement.least_chunk)

    def _items(self, group: PrefillGroup) -> list[PrefillItem]:
        """All tokens of each member."""
        return [
            self._states.next_chunk(sequence, self._states.num_uncached(sequence))
            for sequence in group.members
            if self._states.is_prefilling(sequence.seq_id)
        ]

    def _end_pass(self, group: PrefillGroup) -> None:
        for item in group.items:
            self._states.computed(item)
        self._finished += [item.seq_id for item in group.items]
        self._groups.remove(group)

    def _drop(self, group: PrefillGroup) -> None:
        self._groups.remove(group)
        if group.is_under_way:
            self._dropped.append(group.pass_id)
            self._states.let_go(item.seq_id for item in group.items)

    def _group_of(self, seq_id: int) -> PrefillGroup | None:
        return next((group for group in self._groups if seq_id in group.seq_ids), None)
