"""Error responses of the routes in the OpenAPI schema; FastAPI adds the successful ones."""

from __future__ import annotations

from typing import Any

import pydantic


class ErrorDetail(pydantic.BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    request_id: str | None = None


class ErrorBody(pydantic.BaseModel):
    error: ErrorDetail


_TEXTS = {
    400: "The request is malformed, or asks for something that is not supported",
    401: "The API key is missing or wrong",
    404: "The model is not served here",
    413: "The prompt does not fit the context or the KV cache, or the body is too large",
    422: "The request is malformed",
    429: "The queue is full; Retry-After says when to try again",
    500: "The model produced no finite numbers for this request",
    503: "The server is loading, shutting down or has failed",
    504: "The answer took longer than the server allows",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses of a route."""
    return {status: {"model": ErrorBody, "description": _TEXTS[status]} for status in statuses}


GENERATION_RESPONSES = responses(400, 401, 404, 413, 429, 500, 503, 504)
TOKEN_RESPONSES = responses(400, 401, 413, 422, 503)
