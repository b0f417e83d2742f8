"""What clients are owed and get: requests in state, their tokens as they come from either side, and
counts of all that."""

from __future__ import annotations

from collections.abc import Sequence as Listed

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.engine.stats import EngineStats, KVUse
from sps2_mega.logprobs import TokenLogprob
from sps2_mega.metrics import TokenWaits, waits_ended_at
from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.text.output_processor import OutputProcessor
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import FinishReason, PrefillItem, SamplingParams, Sequence


class Clients:
    """Every request added is answered once, with its last sample, or dropped. Counts are since the
    start of the job."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._outputs = OutputProcessor(tokenizer)
        self._samples: dict[str, list[Sequence]] = {}
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._num_steps, self._last_waits = 0, TokenWaits()
        self._is_turn_counted = False

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._samples

    def open_requests(self) -> list[str]:
        return list(self._samples)

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        samples: list[Sequence],
        *,
        stream: bool,
    ) -> None:
        """Raises RequestError: stop strings were given and there is no tokenizer."""
        self._outputs.add(request_id, prompt_token_ids, params, samples, stream=stream)
        self._samples[request_id] = samples

    def drop(self, request_id: str) -> list[Sequence]:
        """Forget a request; returns its samples, none if it is not in state."""
        self._outputs.drop(request_id)
        return self._samples.pop(request_id, [])

    def take_deltas(self) -> list[OutputDelta]:
        return self._outputs.take_deltas()

    def take_token(
        self,
        sequence: Sequence,
        token_id: int | None,
        logprob: TokenLogprob | None,
        reason: FinishReason | None,
        now: float,
    ) -> bool:
        """True when it was the sequence's last one, for `reason`, or because it completes a stop
        string, or because there is none."""
        if token_id is None:
            sequence.finish_reason = FinishReason.ERROR
            return True
        self._output_tokens += sequence.max_tokens > 0
        sequence.take_token(token_id, logprob, now)
        if self._outputs.check_stop(sequence) and reason is None:
            reason = FinishReason.STOP
        sequence.finish_reason = reason
        if reason is None:
            self._outputs.stream(sequence)
        return reason is not None

    def end(self, sequence: Sequence) -> list[RequestOutput]:
        """After a sequence's last token: its request's output, if this was the last sample."""
        output = self._outputs.finished(sequence)
        if output is None:
            return []
        del self._samples[output.request_id]
        return [output]

    def count_prompt(self, item: PrefillItem) -> None:
        """Of a pass that has begun. Outputs that a preempted sequence computes again do not
        count."""
        prompt = item.num_prompt_tokens
        self._prompt_tokens += min(item.end, prompt) - min(item.start, prompt)
        if item.start == item.num_shared_tokens:
            self._cached_tokens += min(item.start, prompt)

    def begin_turn(self) -> None:
        """Steps that are counted from now on count as one: those who look at waits do so once per
        turn."""
        self._is_turn_counted = False

    def count_step(self, now: float, sequences: Listed[Sequence]) -> None:
        """A step of either side gave these sequences a token at time `now`."""
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
        kv_usage: float,
        kv_sides: tuple[KVUse, ...],
        prefill_comm: CommSeconds,
    ) -> EngineStats:
        """What was counted here, with what others know."""
        return EngineStats(
            num_running=num_running,
            num_waiting=num_waiting,
            kv_usage=kv_usage,
            kv_sides=kv_sides,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            prefill_comm=prefill_comm,
            num_steps=self._num_steps,
            last_waits=self._last_waits,
        )
