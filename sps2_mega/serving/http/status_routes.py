"""Routes about the server itself: health, readiness, status, metrics, version, models."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sps2_mega import __version__
from sps2_mega.serving.http.api_errors import ApiError
from sps2_mega.serving.http.async_engine import State
from sps2_mega.serving.http.documented import responses
from sps2_mega.serving.http.state import ServerState, server_state
from sps2_mega.serving.http.status_body import StatusBody, status_of

router = APIRouter(tags=["status"])


@router.get("/health", responses=responses(503))
async def health(request: Request) -> dict[str, Any]:
    """Live: 200 from the first moment, even while loading and draining; 503 after a failure."""
    async_engine = server_state(request).async_engine
    if async_engine.state is State.FAILED:
        async_engine.model  # noqa: B018  raises with the reason
    return {"status": "ok", "state": async_engine.state.value}


@router.get("/ready", responses=responses(503))
async def ready(request: Request) -> dict[str, Any]:
    """Readiness: weights are loaded, all ranks alive, and the server is not shutting down."""
    state = server_state(request)
    state.async_engine.model  # noqa: B018  503 unless ready
    return {
        "status": "ready",
        "model": state.model_names[0],
        "open_requests": state.async_engine.num_open,
    }


@router.get("/status", responses=responses(401))
async def status(request: Request) -> StatusBody:
    """Content of the page at /: model, ranks, memory, queue, KV cache and recent latency.

    200 in every state.
    """
    state = server_state(request)
    return status_of(
        state.async_engine,
        model=state.model_names[0],
        version=__version__,
        uptime_s=time.time() - state.started,
    )


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    text = server_state(request).async_engine.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/v1/models", responses=responses(401, 503))
async def models(request: Request) -> dict[str, Any]:
    """List the one model that is served."""
    return {"object": "list", "data": [_model(server_state(request))]}


@router.get("/v1/models/{name:path}", responses=responses(401, 404, 503))
async def model(name: str, request: Request) -> dict[str, Any]:
    state = server_state(request)
    described = _model(state)
    if name not in state.model_names:
        raise ApiError(404, f"the model {name[:200]!r} is not served here", code="model_not_found")
    return described


def _model(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.model_names[0],
        "object": "model",
        "created": state.started,
        "owned_by": "sps2_mega",
        "max_model_len": state.async_engine.model.max_len,
    }
