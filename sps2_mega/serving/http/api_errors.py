"""Errors in the form that clients of the OpenAI API expect: an envelope, a status, a retry time.

{"error": {"message": ..., "type": ..., "param": ..., "code": ..., "request_id": ...}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sps2_mega.errors import Refusal

# Status -> type; others are server errors.
TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}
_TOO_LONG = (Refusal.PROMPT_TOO_LONG, Refusal.EXCEEDS_KV_CACHE)


class ApiError(Exception):
    """Failure of a request with this HTTP status; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The error envelope."""
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, "server_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error if request_id is None else {**error, "request_id": request_id}}


def refused(
    refusal: Refusal, *, num_prompt_tokens: int, max_tokens: int | None, max_len: int
) -> ApiError:
    """Error for a refused request, with the numbers."""
    if refusal is Refusal.QUEUE_FULL:
        return queue_full()
    wanted = "the rest" if max_tokens is None else f"{max_tokens} new"
    if refusal in _TOO_LONG:
        return ApiError(
            413,
            f"{refusal.value}: the prompt has {num_prompt_tokens} tokens, {wanted} requested, "
            f"and at most {max_len} fit together",
            code="context_length_exceeded",
            param="prompt",
        )
    return ApiError(400, refusal.value, param="prompt")


def queue_full() -> ApiError:
    return ApiError(
        429, "the queue is full, try again in a second", code="queue_full", retry_after=1
    )


def timed_out(seconds: float) -> ApiError:
    """Error for a timeout, with a header that stops the openai client from retrying.

    A retry would take as long again.
    """
    return ApiError(
        504,
        f"the answer was not complete after {seconds:g} s",
        code="request_timeout",
        headers={"x-should-retry": "false"},
    )
