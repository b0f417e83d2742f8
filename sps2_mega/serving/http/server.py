"""Uvicorn in a thread of its own, on a socket that is bound before any heavy work begins.

The main thread belongs to the engine; `comm.guard` handles signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from sps2_mega.errors import ConfigError
from sps2_mega.serving.http.async_engine import AsyncEngine

# Python's default, 5 ms, is the time the engine's thread may wait for this one after each operator.
_SWITCH_S = 1e-4
_LINGER_S = 3  # seconds for the last responses, once the engine has stopped
_BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket; requests wait there until the server runs.

    Raises:
        ConfigError: the address is taken or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio sets TCP_NODELAY only where the protocol is given. Without it every answer waits
        # some 40 ms for the client's delayed acknowledgement of the headers.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "another --port or --host is needed"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """URL for clients; a server on all interfaces is shown by the loopback address."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer:
    """HTTP server that runs from `start` to `stop`, both called by the main thread."""

    def __init__(self, app: FastAPI, async_engine: AsyncEngine, listener: socket.socket) -> None:
        self._async_engine, self._listener = async_engine, listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_LINGER_S,
            )
        )
        self._running = threading.Event()
        # A daemon: a process that must end does not wait for connections.
        self._thread = threading.Thread(target=self._run, name="sps2-http", daemon=True)

    def start(self) -> None:
        """Start the thread and return once requests are taken.

        From now on threads of this process switch more often.
        """
        sys.setswitchinterval(_SWITCH_S)
        self._thread.start()
        self._running.wait()

    def call_soon(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function in the event loop's thread; do nothing after the loop's end."""
        with contextlib.suppress(RuntimeError):
            self._async_engine.loop.call_soon_threadsafe(function, *arguments)

    def stop(self) -> None:
        """Close the port and wait a little for responses in progress."""
        self._server.should_exit = True
        self._thread.join(_LINGER_S + 2)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._async_engine.attach(asyncio.get_running_loop())
        self._running.set()
        await self._server.serve(sockets=[self._listener])
