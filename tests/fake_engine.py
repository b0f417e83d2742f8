"""An engine without a model: it repeats the prompt's last token, one token per step for every
request. A prompt's token at position p gets the log-probability -p/4, and every token id below it
that of its number."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import Any

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.engine.stats import KVUse
from sps2_mega.errors import Refusal
from sps2_mega.logprobs import PromptLogprobs, TokenLogprob
from sps2_mega.metrics import TokenWaits, waits_ended_at
from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.text.output_processor import OutputProcessor
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import FinishReason, SamplingParams, Sequence

KV_POOLS = (KVUse(pool="all", blocks_per_rank=10, used_per_rank=(0, 5, 10)),)


@dataclass
class Stats:
    num_running: int
    num_waiting: int = 0
    kv_usage: float = 0.5
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    prefill_comm: CommSeconds = field(default_factory=CommSeconds)
    kv_pools: tuple[KVUse, ...] = KV_POOLS
    num_steps: int = 0
    last_waits: TokenWaits = field(default_factory=TokenWaits)


class FakeEngine:
    """Record all calls; `die_after` makes a step raise, `step_s` makes it slow."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int = 64,
        max_queue: int | None = None,
        die_after: int | None = None,
        step_s: float = 0.0,
    ) -> None:
        self.step_s = step_s
        self.tokenizer, self.max_model_len = tokenizer, max_model_len
        self.seen: dict[str, SamplingParams] = {}
        self.most_in_flight = self.steps = self.prompt_tokens = self.output_tokens = 0
        self._outputs = OutputProcessor(tokenizer)
        self._running: dict[str, list[Sequence]] = {}
        self._max_queue, self._die_after = max_queue, die_after
        self._next_id = 0
        self._waits = TokenWaits()
        self.kv_pools = KV_POOLS

    def refusal(self, prompt_token_ids: list[int], params: SamplingParams) -> Refusal | None:
        if not prompt_token_ids:
            return Refusal.EMPTY_PROMPT
        if self.tokenizer is not None:
            ids = [*prompt_token_ids, *params.stop_token_ids]
            if not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
                return Refusal.TOKEN_OUT_OF_RANGE
        if len(prompt_token_ids) >= self.max_model_len:
            return Refusal.PROMPT_TOO_LONG
        return None

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        stream: bool = False,
    ) -> Any:
        reason = self.refusal(prompt_token_ids, params)
        if reason is not None:
            return reason
        if self._max_queue is not None and len(self._running) >= self._max_queue:
            return Refusal.QUEUE_FULL
        self.seen[request_id] = params
        samples = [
            Sequence(
                seq_id=self._next_id + index,
                prompt_token_ids=prompt_token_ids,
                params=params,
                seed=0,
                max_tokens=5 if params.max_tokens is None else params.max_tokens,
                arrival_time=arrival_time or time.monotonic(),
            )
            for index in range(params.n)
        ]
        self._next_id += params.n
        self._outputs.add(request_id, prompt_token_ids, params, samples, stream=stream)
        self._running[request_id] = samples
        self.prompt_tokens += len(prompt_token_ids)
        self.most_in_flight = max(self.most_in_flight, sum(map(len, self._running.values())))
        return None

    def has_work(self) -> bool:
        return bool(self._running)

    def abort(self, request_id: str) -> bool:
        self._outputs.drop(request_id)
        return self._running.pop(request_id, None) is not None

    def take_deltas(self) -> list[OutputDelta]:
        return self._outputs.take_deltas()

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        time.sleep(self.step_s)
        if self._die_after is not None and self.steps > self._die_after:
            raise RuntimeError("out of memory")
        done, now = [], time.monotonic()
        every = [sample for samples in self._running.values() for sample in samples]
        for request_id, samples in list(self._running.items()):
            # Which sample comes first is the scheduler's business.
            for sample in reversed(samples):
                if not sample.token_times and sample is samples[0] and sample.needs_prompt_logprobs:
                    sample.add_prompt_logprobs(_scores(sample))
                token_id = sample.prompt_token_ids[-1]
                logprob = (
                    TokenLogprob(token_id, -0.5) if sample.params.logprobs is not None else None
                )
                sample.take_token(token_id, logprob, now)
                self.output_tokens += len(sample.output_token_ids) > 0
                if self._outputs.check_stop(sample):
                    sample.finish_reason = FinishReason.STOP
                elif len(sample.output_token_ids) >= sample.max_tokens:
                    sample.finish_reason = FinishReason.LENGTH
                else:
                    self._outputs.stream(sample)
            if all(sample.finish_reason for sample in samples):
                done += [self._outputs.finished(sample) for sample in samples]
                del self._running[request_id]
        self._waits = waits_ended_at(now, every)
        return [output for output in done if output is not None]

    def stats(self) -> Stats:
        return Stats(
            num_running=len(self._running),
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            num_steps=self.steps,
            kv_pools=self.kv_pools,
            last_waits=self._waits,
        )


def _scores(sequence: Sequence) -> PromptLogprobs:
    num_top, count = sequence.params.prompt_logprobs, len(sequence.prompt_token_ids) - 1
    return PromptLogprobs(
        first=1,
        num_top=num_top,
        own=array("f", [-0.25 * position for position in range(1, count + 1)]),
        top_ids=array("i", list(range(num_top)) * count),
        top=array("f", [-0.5 * token_id for token_id in range(num_top)] * count),
    )
