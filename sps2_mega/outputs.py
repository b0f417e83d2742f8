"""Outputs for clients: finished requests with their samples, and additions to streamed ones.

Data only, made in `text.output_processor`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.logprobs import PromptLogprobs, TokenLogprob
from sps2_mega.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds of one sample: in the queue, to the first token, mean per later token, in total.

    Time in the queue is part of `ttft_s`. `gaps_s[i]` is the time between output tokens i and i+1.
    """

    queue_s: float
    ttft_s: float
    per_token_s: float | None
    total_s: float
    gaps_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished sample of a request."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A finished request: `completions` has n entries, or `error` says why there are none.

    `num_cached_tokens` of the prompt were cached when its first sample began. `prompt_logprobs` are
    set where they were requested.
    """

    request_id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    error: str | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDelta:
    """Addition of one step to one sample of a streamed request.

    The texts of a sample's deltas joined are its completion's text. `finish_reason` is set in the
    last one, `prompt_logprobs` (if requested) in the first sample's first one.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None
