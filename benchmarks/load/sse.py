"""Server-sent events of a streamed answer of the OpenAI API: JSON objects, then [DONE]."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

_DATA = "data:"


class StreamError(Exception):
    """Wrong end of a stream; the text names the kind without numbers, so that it can be counted."""


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a stream as they arrive.

    Raises:
        StreamError: the server sent an error or no JSON, or the stream ended without [DONE].
    """
    async for line in response.aiter_lines():
        if not line.startswith(_DATA):
            continue  # blank lines between events, and comments that keep the connection
        payload = line[len(_DATA) :].strip()
        if payload == "[DONE]":
            return
        try:
            event = json.loads(payload)
        except ValueError:
            raise StreamError("an event is not JSON") from None
        if "error" in event:
            raise StreamError(error_code(event))
        yield event
    raise StreamError("ended without [DONE]")


def error_code(body: Any) -> str:
    """Code of the error in a body."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "unnamed error")
    return "unnamed error"
