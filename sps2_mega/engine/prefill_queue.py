"""Which prompts are prefilled next, together with which others, and how many layers of theirs: groups in flight.

Decides order, grouping and chunks. Whose turn it is, prefill or decode, is the scheduler's; seconds are `pace`'s.
Without a pace every group goes through the model in one step, first come first served.

The key of a prompt or group is arrival time + `overtake` * expected seconds of prefill left; the least goes first. Keys
do not grow with waiting, so who came later than a prompt's key does not go before it: nobody starves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

from sps2_mega.config import SchedulerConfig
from sps2_mega.engine.pace import Pace
from sps2_mega.engine.prefill_group import PrefillGroup
from sps2_mega.engine.prompt_placement import PromptPlacement
from sps2_mega.engine.sequence_states import SequenceStates
from sps2_mega.types import LayerSlice, PrefillItem, Sequence

# Groups on their way at a time: a long one, one that overtakes it, one that overtakes both. Each keeps hidden states.
MAX_GROUPS = 3
# Computing again costs everybody, waiting one request: and equal prompts must not be told apart by a measurement.
_PATIENCE = 2.0


class PrefillQueue:
    """Every prefilling sequence is in exactly one group, and so is every id that `SequenceStates` holds."""

    def __init__(
        self,
        config: SchedulerConfig,
        states: SequenceStates,
        placement: PromptPlacement,
        pace: Pace | None,
    ) -> None:
        self._config, self._states, self._placement, self._pace = config, states, placement, pace
        self._groups: list[PrefillGroup] = []
        self._finished: list[int] = []  # held ids whose last slice is in the plan being made
        self._dropped: list[int] = []
        self._num_passes = 0
        self._running: tuple[PrefillGroup, int, int] | None = (
            None  # of the plan: layers, FLOPs of each
        )

    def next_slice(
        self, now: float, room_s: float, layer_room_s: float
    ) -> tuple[list[PrefillItem], LayerSlice | None] | None:
        """The items that enter the model and the layers of the next step, as in StepPlan; None when there is nothing
        to prefill. The step should take `room_s` seconds at most, a layer `layer_room_s`."""
        group = self._choose(now, layer_room_s)
        if group is None:
            return None
        entering = not group.items
        if entering:
            self._num_passes += 1
            group.begin_pass(self._num_passes, self._chunks(group, layer_room_s))
        items = group.items
        if self._pace is None:
            self._end_pass(group)
            return items, None
        first, num_layers = group.next_layer, self._pace.work.num_layers
        flops = group.layer_flops(self._pace.work)
        end = min(num_layers, first + self._layers_within(group, flops, room_s))
        self._running = group, end - first, flops
        if end < num_layers:
            group.next_layer = end
            self._states.hold(item.seq_id for item in items)
            return items if entering else [], LayerSlice(group.pass_id, first, end)
        self._end_pass(group)
        if entering:
            return items, None
        sampled = tuple(item.seq_id for item in items if item.samples)
        return [], LayerSlice(group.pass_id, first, end, sampled)

    def planned(self) -> list[int]:
        """Call when the plan is made, its released sequences included; returns the passes that ranks forget."""
        self._states.let_go(self._finished)
        self._finished = []
        dropped, self._dropped = self._dropped, []
        return dropped

    def executed(self, seconds: float) -> None:
        """The step with the last slice took so long."""
        if self._running is None or self._pace is None:
            return
        group, num_layers, flops = self._running
        self._running = None
        group.layer_s = seconds / num_layers
        self._pace.computed(flops, group.layer_s)

    def ended(self, seq_id: int) -> None:
        """A sequence is over. With its last member a group goes, too."""
        group = self._group_of(seq_id)
        if group is not None and not any(map(self._states.is_prefilling, group.seq_ids)):
            self._drop(group)

    def preempt(self, seq_id: int) -> bool:
        """Send the group of a prefilling sequence back to the waiting; False where it has none."""
        group = self._group_of(seq_id)
        if group is None:
            return False
        self._drop(group)
        for member in reversed(group.seq_ids):
            if self._states.is_prefilling(member):
                self._states.preempt(member)
        return True

    def check_integrity(self) -> None:
        """Raises AssertionError when a sequence is lost or in two groups."""
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
        """A group of waiting prompts whose key, and all of theirs, is less than `before`: as many as one step may
        take, or one of any length."""
        members: list[Sequence] = []
        budget, num_new = float(self._config.max_prefill_tokens), 0
        load = [0] * self._placement.sp_size
        left_s = 0.0
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
            late = self._weighted(oldest, left_s + seconds) >= before
            if late or self._weighted(sequence.arrival_time, seconds) >= before:
                break
            quantum = self._quantum(start, sequence.num_tokens, layer_room_s)
            if members and (quantum is not None or num_new + missing > budget):
                break
            spread = self._placement.spread(
                sequence, prefix, load, quantum=quantum, longest_whole=longest_whole
            )
            if not self._states.admit(sequence, prefix, now, spread):
                break
            members.append(sequence)
            num_new, left_s = num_new + missing, left_s + seconds
            if quantum is not None:
                return PrefillGroup(members=members, quantum=quantum)
            if spread.rank is not None:
                load[spread.rank] += missing
            budget = min(budget, self._tokens_within(layer_room_s))
            if num_new >= budget:
                break
        return PrefillGroup(members=members) if members else None

    def _order(self) -> Iterable[Sequence]:
        waiting = list(self._states.waiting.values())
        if self._pace is None or not self._config.overtake:
            return waiting
        return sorted(
            waiting, key=lambda s: self._weighted(s.arrival_time, self._prompt_s(0, s.num_tokens))
        )

    def _key(self, group: PrefillGroup) -> float:
        return self._weighted(group.arrival_time, self._left_s(group))

    def _worth_waiting(self, filler: Sequence, start: int, end: int) -> bool:
        """Not for a long prompt that is interrupted, if it takes far longer than to compute the shared tokens again."""
        group = self._group_of(filler.seq_id)
        return group is None or self._left_s(group) <= _PATIENCE * self._prompt_s(start, end)

    def _left_s(self, group: PrefillGroup) -> float:
        """Expected seconds: what is under way counts by its layers to go, what comes after by tokens."""
        assert self._pace is not None, "groups stay only where they are interrupted"
        work = self._pace.work
        left_s = 0.0
        layer_s = self._layer_s(group, group.layer_flops(work)) if group.items else None
        if layer_s is not None:
            left_s += (work.num_layers - group.next_layer) * layer_s
        ends = {item.seq_id: item.end for item in group.items}
        for sequence in group.members:
            if self._states.is_prefilling(sequence.seq_id):
                total = sequence.num_tokens
                start = ends.get(sequence.seq_id, total - self._states.num_uncached(sequence))
                left_s += self._prompt_s(start, total)
        return left_s

    def _weighted(self, arrival_time: float, seconds: float) -> float:
        return arrival_time + self._config.overtake * seconds

    def _prompt_s(self, start: int, end: int) -> float:
        return 0.0 if self._pace is None else self._pace.prompt_s(start, end)

    def _quantum(self, start: int, end: int, layer_room_s: float) -> int | None:
        """What a prompt's chunks are multiples of; None where it goes whole, a layer of it being short enough."""
        if self._pace is None:
            return None
        least = self._placement.least_chunk
        if self._pace.tokens_within(layer_room_s, start, end, least) == end - start:
            return None
        # Chunks grow shorter with the prompt that they see: so long is the last one.
        last = self._pace.tokens_within(layer_room_s, end, 2 * end, least)
        return last // least * least

    def _tokens_within(self, layer_room_s: float) -> float:
        """How many tokens of short prompts one layer may have."""
        if self._pace is None:
            return math.inf
        most = self._config.max_prefill_tokens
        return self._pace.tokens_within(layer_room_s, 0, most, self._placement.least_chunk)

    def _chunks(self, group: PrefillGroup, layer_room_s: float) -> list[PrefillItem]:
        """The next tokens of each member."""
        items = []
        for sequence in group.members:
            if not self._states.is_prefilling(sequence.seq_id):
                continue
            count = self._states.num_uncached(sequence)
            if group.quantum is not None and self._pace is not None:
                end = sequence.num_tokens
                count = self._pace.tokens_within(layer_room_s, end - count, end, group.quantum)
            items.append(self._states.next_chunk(sequence, count))
        return items

    def _layers_within(self, group: PrefillGroup, flops: int, room_s: float) -> int:
        """At least one, so that prefill gets on; one where nothing is known."""
        layer_s = self._layer_s(group, flops)
        if layer_s is None or layer_s <= 0.0:
            return 1
        return max(1, int(min(room_s / layer_s, 1e6)))

    def _layer_s(self, group: PrefillGroup, flops: int) -> float | None:
        """A pass that has begun says best how long its layers take."""
        if group.layer_s is not None or self._pace is None:
            return group.layer_s
        return self._pace.layer_s(flops)

    def _end_pass(self, group: PrefillGroup) -> None:
        for item in group.items:
            self._states.computed(item)
        self._finished += [item.seq_id for item in group.items]
        group.end_pass()
        if not any(map(self._states.is_prefilling, group.seq_ids)):
            self._groups.remove(group)

    def _drop(self, group: PrefillGroup) -> None:
        self._groups.remove(group)
        if group.next_layer:
            self._dropped.append(group.pass_id)
            self._states.let_go(item.seq_id for item in group.items)

    def _group_of(self, seq_id: int) -> PrefillGroup | None:
        return next((group for group in self._groups if seq_id in group.seq_ids), None)
