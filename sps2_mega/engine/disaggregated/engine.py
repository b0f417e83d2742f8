"""Engine of a job with separate decode ranks, on rank 0; same interface as `engine.engine`.

Rank 0 drives the prefill pool and keeps the requests. Three things happen at once, and meet in one
queue of events that `step` handles:

    a thread      prefill steps on the prefill ranks, one after another         -> StepDone
    decode pool   reservations, and the tokens of its steps (`decode_driver`)   -> Received
    the caller    add_request, abort
"""

from __future__ import annotations

import queue
import time

from sps2_mega.engine.disaggregated.control import Received, agree
from sps2_mega.engine.disaggregated.messages import (
    ControlMessage,
    Drop,
    Expect,
    Leave,
    Left,
    Room,
    Start,
    Tokens,
)
from sps2_mega.engine.disaggregated.prefill_driver import PrefillDriver
from sps2_mega.engine.disaggregated.prefill_rank import PrefillRank
from sps2_mega.engine.disaggregated.request_states import RequestState
from sps2_mega.engine.disaggregated.step_thread import StepDone
from sps2_mega.engine.failing import failing
from sps2_mega.engine.requests import RequestLedger
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.engine.stats import EngineStats, KVUse
from sps2_mega.errors import Refusal
from sps2_mega.mcore.gpt import GPT
from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import SamplingParams, Sequence

# New requests and aborts are handled between calls of `step`, which must not wait for long.
_WAIT_S = 0.005


class DisaggregatedEngine:
    """Every sequence in `_states` still needs an output.

    The decode pool knows exactly these sequences, and some that it has been sent a Drop for.
    """

    def __init__(self, rank: StartedRank, tokenizer: Tokenizer | None) -> None:
        """`rank` is rank 0 of the job, the first one of the prefill pool."""
        self._started, self.config = rank, rank.config
        self.model_config = rank.resolved.config
        self.tokenizer = tokenizer
        self._rank = PrefillRank(rank)
        self._control, self._events = self._rank.control, self._rank.control.events
        self._decode_driver = rank.pools[1].first
        with failing(rank.watchdog):
            # Under CSA a prefix's keys depend on the whole prompt.
            agreement = agree(
                rank, self._control, self._decode_driver, prefixes=self.config.csa.exact
            )
        decode_sp = rank.pools[1].sp
        self._blocks_per_rank = rank.num_blocks, agreement.num_blocks_there // decode_sp
        self._decode_blocks_used = (0,) * decode_sp
        self.max_model_len = agreement.limits.max_len
        self._states: dict[int, RequestState] = {}
        self._prefill = PrefillDriver(
            rank, self._rank, self._states, max_len=self.max_model_len, send_drop=self._send
        )
        self._requests = RequestLedger(
            tokenizer,
            agreement.limits,
            default_seed=self.config.seed,
            max_waiting=self.config.scheduler.max_waiting,
        )
        self._closed = False

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        stream: bool = False,
    ) -> Refusal | None:
        """Queue a request, or refuse it; see `RequestLedger.add`.

        Raises:
            RequestError: stop strings were given and there is no tokenizer.
        """
        samples = self._requests.add(
            request_id,
            prompt_token_ids,
            params,
            num_waiting=self._num_waiting,
            arrival_time=arrival_time,
            stream=stream,
        )
        if isinstance(samples, Refusal):
            return samples
        for sample in samples:
            self._states[sample.seq_id] = RequestState(sample)
            self._send(
                Expect(
                    sample.seq_id,
                    prompt_token_ids,
                    params,
                    sample.seed,
                    sample.max_tokens,
                    self._prefill.expected_s(len(prompt_token_ids)),
                )
            )
        return None

    def refusal(self, prompt_token_ids: list[int], params: SamplingParams) -> Refusal | None:
        """Reason why a request could never run; safe in any thread."""
        return self._requests.refusal(prompt_token_ids, params)

    def take_deltas(self) -> list[OutputDelta]:
        """Additions to streamed requests since the last call, in order."""
        return self._requests.take_deltas()

    def abort(self, request_id: str) -> bool:
        """Drop a request in any state, without an output; False when it is not in flight."""
        samples = self._requests.drop(request_id)
        for sample in samples:
            state = self._states.pop(sample.seq_id, None)
            if state is not None:  # else this sample has ended
                self._prefill.drop(state)
        self._prefill.finish_drops()
        return bool(samples)

    @property
    def model(self) -> GPT:
        """This rank's model, for measurements."""
        return self._started.executor.model

    def has_work(self) -> bool:
        """Whether an output is due, or a block is in use on either pool."""
        return bool(self._states) or self._prefill.is_busy or any(self._decode_blocks_used)

    def stats(self) -> EngineStats:
        """Snapshot between two calls of `step`; `kv_usage` is that of both pools together."""
        pools = tuple(
            KVUse(pool=pool.name, blocks_per_rank=blocks, used_per_rank=used)
            for pool, blocks, used in zip(
                self._started.pools,
                self._blocks_per_rank,
                (self._prefill.kv_used_per_rank, self._decode_blocks_used),
                strict=True,
            )
        )
        return self._requests.stats(
            num_running=len(self._states) - self._num_waiting,
            num_waiting=self._num_waiting,
            kv_pools=pools,
            prefill_comm=self._prefill.comm,
        )

    def step(self) -> list[RequestOutput]:
        """Wait briefly for news of either pool, if any is due; return the finished requests."""
        self._requests.begin_turn()
        with failing(self._started.watchdog):
            self._prefill.begin_step()
            finished = self._handle_events(_WAIT_S if self.has_work() else 0.0)
            self._prefill.begin_step()
            return finished

    def shutdown(self) -> None:
        """End the job on all ranks; requests in flight are dropped. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        with failing(self._started.watchdog):
            for request_id in self._requests.open_requests:
                self.abort(request_id)
            while self._prefill.is_busy:
                self._handle_events(_WAIT_S)
            self._prefill.close()
            self._send(Leave())
            while not isinstance(received := self._events.get(), Received) or not isinstance(
                received.message, Left
            ):
                continue
            self._rank.dismiss()
        self._started.leave()

    @property
    def _num_waiting(self) -> int:
        return sum(not f.is_decoding and not f.is_computed for f in self._states.values())

    def _handle_events(self, wait_s: float) -> list[RequestOutput]:
        """Handle all events in the queue; wait up to `wait_s` seconds for the first one."""
        finished: list[RequestOutput] = []
        while True:
            try:
                event = self._events.get(timeout=wait_s) if wait_s else self._events.get_nowait()
            except queue.Empty:
                return finished
            wait_s = 0.0
            if isinstance(event, StepDone):
                finished += self._end_prefill(event)
            else:
                finished += self._handle_message(event.message)

    def _handle_message(self, message: ControlMessage) -> list[RequestOutput]:
        if isinstance(message, Room):
            state = self._states.get(message.seq_id)
            if state is not None:
                self._prefill.offer(state, message)
            return []
        assert isinstance(message, Tokens), f"the prefill pool does not expect {message}"
        now = time.monotonic()
        self._decode_blocks_used = message.used_per_rank
        got: list[Sequence] = []
        finished: list[RequestOutput] = []
        for token in message.tokens:
            state = self._states.get(token.seq_id)
            if state is None:
                continue  # dropped here before the decode pool received of it
            got.append(state.sequence)
            reason = self._requests.take_token(
                state.sequence, token.token_id, token.logprob, token.reason, now
            )
            if reason is not None:
                if token.reason is None:
                    self._send(Drop(token.seq_id, state.handoff))
                finished += self._end(state)
        self._requests.count_step(now, got)
        return finished

    def _end_prefill(self, done: StepDone) -> list[RequestOutput]:
        """Give clients the first tokens of a prefill step; the decode pool continues from them."""
        now = time.monotonic()
        self._requests.count_prompts(done.plan.prefills)
        finished: list[RequestOutput] = []
        got: list[Sequence] = []
        for first in self._prefill.end_step(done, now):
            state, sequence = first.state, first.state.sequence
            assert state.handoff is not None
            got.append(sequence)
            reason = self._requests.take_token(
                sequence, first.token_id, first.logprob, first.reason, now
            )
            if reason is not None:
                damaged = first.token_id is None
                self._send(Drop(sequence.seq_id, state.handoff, damaged=damaged))
                finished += self._end(state)
            else:
                assert first.token_id is not None
                state.is_decoding = True
                self._send(Start(sequence.seq_id, state.handoff, first.token_id))
        self._requests.count_step(now, got)
        return finished

    def _end(self, state: RequestState) -> list[RequestOutput]:
        del self._states[state.sequence.seq_id]
        return self._requests.end(state.sequence)

    def _send(self, message: ControlMessage) -> None:
        self._control.send(self._decode_driver, message)
