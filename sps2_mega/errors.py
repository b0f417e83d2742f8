"""What can go wrong, by who has to act: the user's configuration, a file, one request, or a
rank."""

from __future__ import annotations

import enum


class ConfigError(ValueError):
    """The configuration cannot work; the message names what was given and what is needed."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message lists the names, shapes or files concerned."""


class RequestError(ValueError):
    """One request is malformed; other requests are not concerned."""


class RankFailure(RuntimeError):
    """A rank died or stopped answering; the message names rank, step and cause."""


class Refusal(enum.Enum):
    """Why a well-formed request was not admitted. An expected outcome, so a value and not an
    exception."""

    EMPTY_PROMPT = "the prompt has no tokens"
    PROMPT_TOO_LONG = "the prompt is longer than the model's context"
    EXCEEDS_KV_CACHE = "prompt and new tokens together do not fit the KV cache"
    QUEUE_FULL = "the waiting queue is full"
    DUPLICATE_ID = "a request with this id is already in flight"
    TOKEN_OUT_OF_RANGE = "the prompt has token ids outside the vocabulary"
    STOP_TOKEN_OUT_OF_RANGE = "stop_token_ids has token ids outside the vocabulary"
