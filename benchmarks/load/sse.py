"""Server-sent events of a streamed answer, as the OpenAI API sends them: JSON objects, then
[DONE]."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

_DATA = "data:"


class StreamError(Exception):
    """A stream did not end as it should; the text names the kind, without numbers, so that kinds
    can be counted."""


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, as they come.

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
    """Which error a body names."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "unnamed error")
    return "unnamed error"
