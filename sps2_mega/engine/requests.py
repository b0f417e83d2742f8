"""Ledger of a job's requests, from admission to the answer; engines of both kinds keep one.

    add -> samples, for the engine to schedule
    a token of a step -> stop strings, streamed text, counts -> end -> output of the request
    drop -> no output

Which sequence runs when is the scheduler's decision. Only the driver of a job has a ledger.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Listed

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.engine.fan_out import fan_out
from sps2_mega.engine.stats import EngineStats, KVUse
from sps2_mega.errors import Refusal
from sps2_mega.logprobs import TokenLogprob
from sps2_mega.metrics import TokenWaits, waits_ended_at
from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.scheduler.admission import Limits, refusal
from sps2_mega.text.output_processor import OutputProcessor
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import FinishReason, PrefillItem, SamplingParams, Sequence


class RequestLedger:
    """Every request added is answered once, with its last sample, or dropped."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        limits: Limits,
        *,
        default_seed: int,
        max_waiting: int | None,
    ) -> None:
        """`default_seed` seeds requests without a seed of their own; a request whose samples would
        make more than `max_waiting` sequences wait is refused."""
        self.tokenizer = tokenizer
        self._limits, self._default_seed, self._max_waiting = limits, default_seed, max_waiting
        self._outputs = OutputProcessor(tokenizer)
        self._samples: dict[str, list[Sequence]] = {}
        self._sequences: dict[int, Sequence] = {}  # samples without a finish reason, by id
        self._next_seq_id = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._num_steps, self._last_waits = 0, TokenWaits()
        self._is_turn_counted = False

    @property
    def open_requests(self) -> list[str]:
        """Requests without an answer."""
        return list(self._samples)

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        num_waiting: int,
        arrival_time: float | None = None,
        stream: bool = False,
    ) -> Refusal | list[Sequence]:
        """Admit a request and return its n samples, or refuse it.

        Args:
            request_id: unique among the requests without an answer.
            prompt_token_ids: shared by all samples.
            params: of each sample; the n-th one derives its seed from `seed` and n.
            num_waiting: sequences in the engine's queue now.
            arrival_time: seconds of time.monotonic(); default now.
            stream: whether `take_deltas` reports what each step adds.

        Raises:
            RequestError: stop strings were given and there is no tokenizer.
        """
        if request_id in self._samples:
            return Refusal.DUPLICATE_ID
        samples = fan_out(
            request_id,
            prompt_token_ids,
            params,
            first_seq_id=self._next_seq_id,
            max_len=self._limits.max_len,
            default_seed=self._default_seed,
            arrival_time=time.monotonic() if arrival_time is None else arrival_time,
        )
        reason = refusal(samples[0], self._limits)
        if reason is None and self._is_full(num_waiting + params.n):
            reason = Refusal.QUEUE_FULL
        if reason is not None:
            return reason
        # Only now: a tokenizer may fail on tokens outside its vocabulary.
        self._outputs.add(request_id, prompt_token_ids, params, samples, stream=stream)
        self._next_seq_id += params.n
        self._samples[request_id] = samples
        self._sequences.update((sample.seq_id, sample) for sample in samples)
        return samples

    def refusal(self, prompt_token_ids: list[int], params: SamplingParams) -> Refusal | None:
        """Reason why a request could never run, even alone; safe in any thread.

        Nothing that it reads ever changes.
        """
        sample = Sequence(
            seq_id=-1,
            prompt_token_ids=prompt_token_ids,
            params=params,
            seed=0,
            max_tokens=1 if params.max_tokens is None else params.max_tokens,
            arrival_time=0.0,
        )
        return refusal(sample, self._limits)

    def drop(self, request_id: str) -> list[Sequence]:
        """Forget a request without an output; return its samples, none for an unknown request."""
        samples = self._samples.pop(request_id, [])
        for sample in samples:
            self._sequences.pop(sample.seq_id, None)
        self._outputs.drop(request_id)
        return samples

    def live(self, seq_ids: Iterable[int]) -> list[Sequence]:
        """The given sequences, less those that were dropped or have ended."""
        return [self._sequences[seq_id] for seq_id in seq_ids if seq_id in self._sequences]

    def take_token(
        self,
        sequence: Sequence,
        token_id: int | None,
        logprob: TokenLogprob | None,
        reason: FinishReason | None,
        now: float,
    ) -> FinishReason | None:
        """Append a token that was chosen elsewhere, None where the model gave no finite logits,
        then `note_token`. With a `reason` it is the sequence's last one."""
        if token_id is None:
            sequence.finish_reason = FinishReason.ERROR
        else:
            sequence.take_token(token_id, logprob, now)
            sequence.finish_reason = reason
        return self.note_token(sequence)

    def note_token(self, sequence: Sequence) -> FinishReason | None:
        """Count the token that a sequence just got, look for a stop string and stream the text.

        Return the sequence's finish reason, None while it goes on. STOP is set here where the token
        completes a stop string.
        """
        if sequence.finish_reason is FinishReason.ERROR:
            return FinishReason.ERROR
        self._output_tokens += sequence.max_tokens > 0
        if self._outputs.check_stop(sequence) and sequence.finish_reason is None:
            sequence.finish_reason = FinishReason.STOP
        if sequence.finish_reason is None:
            self._outputs.stream(sequence)
        return sequence.finish_reason

    def end(self, sequence: Sequence) -> list[RequestOutput]:
        """Close a sequence that has ended; return its request's output after the last sample."""
        del self._sequences[sequence.seq_id]
        output = self._outputs.finished(sequence)
        if output is None:
            return []
        del self._samples[output.request_id]
        return [output]

    def take_deltas(self) -> list[OutputDelta]:
        """Additions to streamed requests since the last call, in order."""
        return self._outputs.take_deltas()

    def count_prompts(self, items: Iterable[PrefillItem]) -> None:
        """Count the tokens of prefill passes that began. Outputs that a preempted sequence computes
        again do not count."""
        for item in items:
            prompt = item.num_prompt_tokens
            self._prompt_tokens += min(item.end, prompt) - min(item.start, prompt)
            if item.start == item.num_shared_tokens:
                self._cached_tokens += min(item.start, prompt)

    def begin_turn(self) -> None:
        """Count all steps from now until the next call as one: waits are read once per turn."""
        self._is_turn_counted = False

    def count_step(self, now: float, sequences: Listed[Sequence]) -> None:
        """Record the waits that tokens of time `now` ended for these sequences."""
        if not sequences:
            return
        waits = waits_ended_at(now, sequences)
        if self._is_turn_counted:
            before = self._last_waits
            waits = TokenWaits(
                ttfts_s=before.ttfts_s + waits.ttfts_s, gaps_s=before.gaps_s + waits.gaps_s
            )
        else:
            self._num_steps += 1
        self._last_waits, self._is_turn_counted = waits, True

    def stats(
        self,
        *,
        num_running: int,
        num_waiting: int,
        kv_pools: tuple[KVUse, ...],
        prefill_comm: CommSeconds,
    ) -> EngineStats:
        """Snapshot of the counts, completed by the engine's own figures."""
        num_used = sum(sum(pool.used_per_rank) for pool in kv_pools)
        num_blocks = sum(pool.blocks_per_rank * len(pool.used_per_rank) for pool in kv_pools)
        return EngineStats(
            num_running=num_running,
            num_waiting=num_waiting,
            kv_usage=num_used / max(1, num_blocks),
            kv_pools=kv_pools,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            prefill_comm=prefill_comm,
            num_steps=self._num_steps,
            last_waits=self._last_waits,
        )

    def _is_full(self, num_waiting: int) -> bool:
        return self._max_waiting is not None and num_waiting > self._max_waiting
