"""State of each sequence on its way through both pools, as the prefill driver knows it.

    expected --Room--> offered --plan--> computed (in passes) --first token--> decoding --> over
        ^                                                                        |
        '------------------------ Room again, after a preemption ----------------'

Decides what the prefill pool's scheduler sees of a sequence; `engine` sends the messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.engine.disaggregated.kv_transfer import Destination
from sps2_mega.engine.disaggregated.kv_transfer_plan import Placement
from sps2_mega.engine.disaggregated.messages import Room
from sps2_mega.types import Sequence


@dataclass(slots=True)
class RequestState:
    """State of one sequence.

    `sequence` is what its client sees. `attempt` is what the prefill pool's scheduler has of it,
    while it does, and `room` the destination of its tokens then. `handoff` is the last one that
    began.
    """

    sequence: Sequence
    attempt: Sequence | None = None
    room: Room | None = None
    handoff: int | None = None
    is_computed: bool = False
    is_decoding: bool = False

    def offer(self, room: Room) -> Sequence:
        """Take the decode pool's reservation, and return the attempt to schedule."""
        sequence = self.sequence
        assert room.num_tokens == sequence.num_tokens, (
            f"sequence {sequence.seq_id} has {sequence.num_tokens} tokens, "
            f"the decode pool knows of {room.num_tokens}"
        )
        if self.is_decoding:
            sequence.num_preemptions += 1
            self.is_decoding = False
        self.room = room
        self.attempt = Sequence(
            seq_id=sequence.seq_id,
            prompt_token_ids=sequence.prompt_token_ids,
            params=sequence.params,
            seed=sequence.seed,
            max_tokens=sequence.max_tokens,
            arrival_time=sequence.arrival_time,
            output_token_ids=list(sequence.output_token_ids),
            num_preemptions=sequence.num_preemptions,
            spans=sequence.spans,
            prompt_logprobs=sequence.prompt_logprobs,
        )
        return self.attempt

    def begin_pass(self) -> Destination:
        """Mark the next pass as planned, and return the destination of its tokens."""
        assert self.room is not None
        self.is_computed, self.handoff = True, self.room.handoff
        return self.destination

    @property
    def destination(self) -> Destination:
        """Destination of the attempt's tokens."""
        assert self.room is not None
        placement = Placement(self.room.block_ranks, self.room.block_ids)
        return Destination(self.room.handoff, self.room.first, placement)

    def end_attempt(self) -> Sequence:
        """Return the attempt, which has its token, and leave the state without one."""
        attempt, self.attempt, self.room = self.attempt, None, None
        assert attempt is not None
        self.is_computed = False
        sequence = self.sequence
        if sequence.scheduled_time is None:
            sequence.scheduled_time = attempt.scheduled_time
            sequence.num_cached_tokens = attempt.num_cached_tokens
        sequence.spans = attempt.spans
        sequence.prompt_logprobs = attempt.prompt_logprobs
        return attempt
