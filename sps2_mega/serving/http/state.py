"""Server state that routes need."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from fastapi import Request

from sps2_mega.serving.http.async_engine import AsyncEngine
from sps2_mega.serving.http.settings import ServerConfig

logger = logging.getLogger(__name__)

_MAX_WARNINGS = 100  # a client can invent any number of field names


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """The server's engine and settings.

    `model_names` are the names by which clients may call the model; the first one is shown to them.
    """

    async_engine: AsyncEngine
    config: ServerConfig
    model_names: tuple[str, ...]
    started: int  # Unix seconds
    _warned: set[str] = field(default_factory=set)

    def warn_once(self, warning: str) -> None:
        if warning not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(warning)
            logger.warning("%s (said once)", warning[:200])


def server_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
