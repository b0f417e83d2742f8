"""Driver of the prefill pool, on rank 0: plans its steps, and cuts sequences that were dropped.

Plans are made here, in the caller's thread; a thread of its own runs them on all prefill ranks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.engine.disaggregated.frames import Cut
from sps2_mega.engine.disaggregated.kv_transfer import receiving_ranks
from sps2_mega.engine.disaggregated.messages import Drop, Room
from sps2_mega.engine.disaggregated.prefill_rank import PrefillRank
from sps2_mega.engine.disaggregated.request_states import RequestState
from sps2_mega.engine.disaggregated.step_thread import StepDone, StepThread
from sps2_mega.engine.startup.scheduler_setup import make_scheduler
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.logprobs import TokenLogprob
from sps2_mega.scheduler.open_passes import OpenPasses
from sps2_mega.types import FinishReason


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Token that a prefill gave a live sequence, its last one if there is a `reason`."""

    state: RequestState
    token_id: int | None
    logprob: TokenLogprob | None
    reason: FinishReason | None


class PrefillDriver:
    """Driver of prefill, a step at a time; sends the decode pool one Drop per dropped sequence."""

    def __init__(
        self,
        started: StartedRank,
        rank: PrefillRank,
        states: Mapping[int, RequestState],
        *,
        max_len: int,
        send_drop: Callable[[Drop], None],
    ) -> None:
        """Set up the scheduler and the thread.

        `states` are all sequences that need an output, by id, kept by the caller; `max_len` is the
        longest prompt plus output that both pools can hold, in tokens.
        """
        self._started, self._states, self._send_drop = started, states, send_drop
        # Waiting sequences were admitted before, so the queue has no limit here. With a target for
        # the time between tokens prompts run in slices here too, although nothing decodes: short
        # prompts and aborts get their turn.
        unlimited = dataclasses.replace(started.config.scheduler, max_waiting=None)
        self._scheduler = make_scheduler(
            dataclasses.replace(
                started,
                config=started.config.replace(scheduler=unlimited),
                max_model_len=max_len,
            )
        )
        self._thread = StepThread(
            rank, started.watchdog, started.executor.device, rank.control.events
        )
        self._passes = OpenPasses(started.resolved.config.num_layers)
        self._dropped: dict[int, RequestState] = {}  # while their passes run
        self.is_busy = False  # a step is running
        self.comm = CommSeconds()  # rank 0's, in all steps

    @property
    def kv_used_per_rank(self) -> tuple[int, ...]:
        """Blocks in use on each SP rank."""
        return self._scheduler.kv_used_per_rank

    def expected_s(self, num_tokens: int) -> float:
        """Expected seconds of a prompt's prefill; 0 before anything was measured."""
        return self._scheduler.expected_prefill_s(num_tokens)

    def offer(self, state: RequestState, room: Room) -> None:
        """Queue a sequence for which the decode pool has reserved blocks."""
        refused = self._scheduler.add(state.offer(room))
        assert refused is None, f"sequence {room.seq_id} was refused late: {refused}"

    def begin_step(self) -> None:
        """Begin the next step, unless one is running or there is nothing to do."""
        if self.is_busy:
            return
        plan = self._scheduler.plan(time.monotonic())
        if plan is None:
            return
        self.is_busy = True
        self._passes.planned(plan)
        self._thread.begin(
            plan,
            {item.seq_id: self._states[item.seq_id].begin_pass() for item in plan.prefills},
        )

    def end_step(self, done: StepDone, now: float) -> list[FirstToken]:
        """Take the outcome of the running step."""
        self.is_busy = False
        plan, output = done.plan, done.output
        self._scheduler.commit(plan, output, now)
        self.comm += self._started.executor.prefill_comm
        tokens = []
        for seq_id, token_id, logprob in zip(
            plan.sampled, output.token_ids, output.logprobs, strict=True
        ):
            dropped = self._dropped.pop(seq_id, None)
            if dropped is not None:
                self._send_drop(Drop(seq_id, dropped.handoff, damaged=token_id is None))
                continue
            state = self._states[seq_id]
            attempt = state.end_attempt()
            tokens.append(FirstToken(state, token_id, logprob, attempt.finish_reason))
            # Its blocks are copied by now; shareable prefixes stay in the cache.
            self._scheduler.finish(seq_id, FinishReason.LENGTH)
        self._cut_dropped()
        return tokens

    def drop(self, state: RequestState) -> None:
        """Forget a sequence that the caller has removed from its states."""
        seq_id = state.sequence.seq_id
        if state.attempt is not None:
            self._scheduler.abort(seq_id)
        if state.is_computed:
            self._dropped[seq_id] = state  # how much of it is sent is known between steps only
        else:
            self._send_drop(Drop(seq_id, state.handoff))

    def finish_drops(self) -> None:
        """Close a series of drops: sequences that were dropped together are known from now on."""
        self._cut_dropped()

    def close(self) -> None:
        """End the thread, after everything that it was given to do."""
        assert not self.is_busy and not self._dropped, "a step is under way"
        self._thread.close()

    def _cut_dropped(self) -> None:
        """Stop sending sequences that were dropped while they were computed, except those whose
        pass is completed for the sake of others."""
        if self.is_busy:
            return
        cuts = []
        for seq_id, state in list(self._dropped.items()):
            if not self._passes.goes_on(seq_id, self._states):
                del self._dropped[seq_id]
                self._send_drop(Drop(seq_id, state.handoff))
                cuts.append(self._cut_of(state))
        if cuts:
            self._thread.cut(cuts)

    def _cut_of(self, state: RequestState) -> Cut:
        destination, sequence = state.destination, state.sequence
        ranks = receiving_ranks(
            destination,
            sequence.num_tokens,
            decode=self._started.pools[1],
            block_size=self._started.config.cache.block_size,
        )
        return Cut(sequence.seq_id, destination.handoff, tuple(ranks))
