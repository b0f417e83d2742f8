"""Gate before every HTTP request: request id, API key, body size, and a line in the log.

Plain ASGI, because middleware that wraps responses would hide that a client has left.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sps2_mega.serving.http.api_errors import ApiError
from sps2_mega.serving.http.page_routes import PAGE_PATHS
from sps2_mega.serving.http.prometheus import ServerMetrics
from sps2_mega.serving.http.settings import ServerConfig

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
# Open without a key, so that load balancers, Prometheus and browsers need
# none; they reveal nothing about requests.
OPEN_PATHS = frozenset(["/health", "/ready", "/metrics", "/version", "/openapi.json", *PAGE_PATHS])
_QUIET_PATHS = frozenset(["/health", "/ready", "/metrics", "/status", *PAGE_PATHS])
_VALID_ID = re.compile(r"[!-~]{1,128}")


class Gate:
    """Middleware that gives a request an id and passes it on, or answers it with 401 or 413."""

    def __init__(
        self, app: ASGIApp, *, config: ServerConfig, metrics: ServerMetrics, paths: frozenset[str]
    ) -> None:
        """Wrap `app`; `paths` are the routes, the only values that metrics may show."""
        self._app, self._metrics, self._paths = app, metrics, paths
        self._max_body = config.max_body_bytes
        self._key = None if config.api_key is None else f"Bearer {config.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            error = self._refusal(scope["path"], headers)
            if error is not None:
                await response_of(error, request_id)(scope, receive, send_with_id)
            else:
                await self._app(scope, self._limited(receive), send_with_id)
        finally:
            self._note(scope, request_id, status, time.monotonic() - began)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._key is not None and path not in OPEN_PATHS:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._key):
                return ApiError(
                    401,
                    "a valid API key is needed, as header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._max_body:
            return ApiError(413, self._too_large, code="request_too_large")
        return None

    @property
    def _too_large(self) -> str:
        return f"the request body is larger than {self._max_body} bytes"

    def _limited(self, receive: Receive) -> Receive:
        """Count received bytes, for bodies that do not state their length."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise HTTPException(413, self._too_large)
            return message

        return counted

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.responded(path, status)
        if path not in _QUIET_PATHS:
            logger.info(
                "%s %s %s in %.3f s, request %s",
                scope["method"],
                scope["path"] if path != "other" else repr(scope["path"][:80]),
                status or "left by the client",
                seconds,
                request_id,
            )


def response_of(error: ApiError, request_id: str | None) -> JSONResponse:
    return JSONResponse(error.body(request_id), status_code=error.status, headers=error.headers)


def request_id_of(scope: Scope) -> str:
    """Request id assigned by the gate."""
    state: dict[str, Any] = scope["state"]
    return str(state["request_id"])


def _request_id(headers: Headers) -> str:
    """The client's own id if it is printable, so that both logs match; otherwise a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
