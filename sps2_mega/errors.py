"""Errors, by who has to act: on the configuration, on a file, on one request, or on a rank."""

from __future__ import annotations

import enum


class ConfigError(ValueError):
    """A configuration that cannot work; the message names what was given and what is needed."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message lists the names, shapes or files."""


class RequestError(ValueError):
    """A malformed request; other requests are not concerned."""


class RankFailure(RuntimeError):
    """A rank that died or stopped answering; the message names rank, step and cause."""


class Refused(Exception):
    """A refusal during the start that all ranks know of; `error` is what each caller gets."""

    def __init__(self, error: ConfigError | CheckpointError) -> None:
        super().__init__(str(error))
        self.error = error


class Refusal(enum.Enum):
    """Reason why a well-formed request was not admitted: an expected outcome, so a value."""

    EMPTY_PROMPT = "the prompt has no tokens"
    PROMPT_TOO_LONG = "the prompt is longer than the model's context"
    EXCEEDS_KV_CACHE = "prompt and new tokens together do not fit the KV cache"
    QUEUE_FULL = "the waiting queue is full"
    DUPLICATE_ID = "a request with this id is already in flight"
    TOKEN_OUT_OF_RANGE = "the prompt has token ids outside the vocabulary"
    STOP_TOKEN_OUT_OF_RANGE = "stop_token_ids has token ids outside the vocabulary"
