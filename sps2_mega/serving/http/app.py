"""The ASGI application: routes, the gate before them, and errors in one shape."""

from __future__ import annotations

import logging
import time

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from sps2_mega import __version__
from sps2_mega.serving.http import generation_routes, page_routes, status_routes, token_routes
from sps2_mega.serving.http.api_errors import ApiError
from sps2_mega.serving.http.async_engine import AsyncEngine
from sps2_mega.serving.http.gate import Gate, response_of
from sps2_mega.serving.http.settings import ServerConfig
from sps2_mega.serving.http.state import ServerState
from sps2_mega.serving.protocol import validation_text

logger = logging.getLogger(__name__)


def build_app(
    async_engine: AsyncEngine, config: ServerConfig, model_names: tuple[str, ...]
) -> FastAPI:
    """Build the server's application; it answers 503 until `async_engine` is ready."""
    app = FastAPI(
        title="sps2_mega",
        version=__version__,
        description="OpenAI-compatible server of one model.",
        # Their pages load scripts from elsewhere; the schema itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = ServerState(
        async_engine=async_engine, config=config, model_names=model_names, started=int(time.time())
    )
    for routes in (generation_routes, token_routes, status_routes, page_routes):
        app.include_router(routes.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(
        Gate, config=config, metrics=async_engine.metrics, paths=frozenset(app.openapi()["paths"])
    )
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return response_of(error, _request_id(request))


async def _invalid(request: Request, error: Exception) -> Response:
    """Answer 400 on OpenAI's routes, as its clients expect, and 422 elsewhere, as FastAPI does."""
    assert isinstance(error, RequestValidationError)
    items = [
        {**item, "loc": item["loc"][1:] or ("body",)}
        for item in error.errors()
        if item["type"] != "json_invalid"
    ]
    text = validation_text(items) if items else "the request body is not JSON"
    status = 400 if request.url.path.startswith("/v1/") else 422
    param = next((item["loc"][0] for item in items if item["loc"] != ("body",)), None)
    named = ApiError(status, text, param=None if param is None else str(param))
    return response_of(named, _request_id(request))


async def _http_exception(request: Request, error: Exception) -> Response:
    """Answer unknown paths and methods, unreadable bodies, and bodies that grow too large."""
    assert isinstance(error, HTTPException)
    named = ApiError(error.status_code, str(error.detail), headers=error.headers)
    return response_of(named, _request_id(request))


async def _unexpected(request: Request, error: Exception) -> Response:
    """Answer our own mistake: the log has the traceback, the client the request id."""
    return response_of(
        ApiError(500, "an internal error; the server's log has it under this request id"),
        _request_id(request),
    )


def _request_id(request: Request) -> str | None:
    value = request.scope.get("state", {}).get("request_id")
    return None if value is None else str(value)
