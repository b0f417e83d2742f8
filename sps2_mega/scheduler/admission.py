"""Refusal of sequences, and the end of sequences: pure functions of a sequence and the limits.

Decides nothing about order or blocks; the scheduler calls both.
"""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.errors import Refusal
from sps2_mega.types import FinishReason, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of every sequence. `cache_tokens` is the capacity of an otherwise empty KV cache."""

    max_model_len: int
    cache_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    @property
    def max_len(self) -> int:
        """Longest prompt plus output. The last token is never fed, so it needs no cache."""
        return min(self.max_model_len, self.cache_tokens + 1)


def refusal(sequence: Sequence, limits: Limits) -> Refusal | None:
    """Reason why a sequence could never run, even alone; None when it can.

    A prompt must leave room for one new token, unless none is wanted. With `params.max_tokens`
    given, all of those tokens must fit the cache (cut at `max_model_len`); without, the sequence
    may run until the cache is full.
    """
    prompt = sequence.prompt_token_ids
    if not prompt:
        return Refusal.EMPTY_PROMPT
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        return Refusal.TOKEN_OUT_OF_RANGE
    if max(sequence.params.stop_token_ids, default=0) >= limits.vocab_size:
        return Refusal.STOP_TOKEN_OUT_OF_RANGE
    new_tokens = 1 if sequence.params.max_tokens is None else sequence.max_tokens
    if len(prompt) + min(new_tokens, 1) > limits.max_model_len:
        return Refusal.PROMPT_TOO_LONG
    if len(prompt) > limits.cache_tokens:
        return Refusal.EXCEEDS_KV_CACHE  # all of them are fed, unlike the last token of an output
    if min(len(prompt) + new_tokens, limits.max_model_len) > limits.max_len:
        return Refusal.EXCEEDS_KV_CACHE
    return None


def finish_reason(sequence: Sequence, limits: Limits) -> FinishReason | None:
    """Reason why a sequence ends with its last output token; None when it goes on.

    An end-of-sequence or stop token ends it from `min_tokens` output tokens on.
    """
    if sequence.max_tokens == 0:
        return FinishReason.LENGTH
    params = sequence.params
    last = sequence.output_token_ids[-1]
    num_outputs = len(sequence.output_token_ids)
    if num_outputs >= params.min_tokens:
        if last in params.stop_token_ids:
            return FinishReason.STOP
        if not params.ignore_eos and last in limits.eos_token_ids:
            return FinishReason.STOP
    if num_outputs >= sequence.max_tokens or sequence.num_tokens >= limits.max_len:
        return FinishReason.LENGTH
    return None
