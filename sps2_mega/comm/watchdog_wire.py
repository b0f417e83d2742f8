"""Messages of the watchdog: one JSON object per line, over TCP or a socket pair.

    rank -> hub   hello, beat, evidence, goodbye
    hub -> rank   beat, farewell (the answer to goodbye), root_cause

This module decides framing and encoding only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
from typing import Any

from sps2_mega.comm.root_cause import Evidence, Kind, Member, Place, RootCause

MAX_LINE = 1 << 20  # bytes; a peer that sends more is not one of ours


class WireError(RuntimeError):
    """The peer does not speak this protocol."""


class LineSocket:
    """Socket that carries whole messages; several threads may call `send`, one thread `receive`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._pending = b""
        self._send_lock = threading.Lock()

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, kind: str, **content: Any) -> bool:
        """Send one message; False if the peer is gone or does not read.

        Messages are too few and small to fill a buffer otherwise. The caller learns the
        reason from `receive` or from missing heartbeats.
        """
        data = json.dumps({"kind": kind, **content}).encode() + b"\n"
        with self._send_lock:
            try:
                self.socket.sendall(data)
            except OSError:
                return False
        return True

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the messages that have arrived, and whether the connection is still open.

        Raises:
            WireError: the received data is not a message.
        """
        is_open = True
        while True:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                is_open = False
                break
            if not data:
                is_open = False
                break
            self._pending += data
            if len(self._pending) > MAX_LINE:
                raise WireError("line too long")
        *lines, self._pending = self._pending.split(b"\n")
        return [_decode(line) for line in lines], is_open

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _decode(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise WireError(f"not a message: {line[:80]!r}") from error
    if not isinstance(message, dict) or "kind" not in message:
        raise WireError(f"not a message: {line[:80]!r}")
    return message


def to_json(value: Place | Member | Evidence | RootCause) -> dict[str, Any]:
    return dataclasses.asdict(value)


def place_from(data: dict[str, Any]) -> Place:
    return Place(data["step"], data["what"])


def member_from(data: dict[str, Any]) -> Member:
    host, node_rank = data["node"]
    return Member(**{**data, "node": (host, node_rank)})


def evidence_from(data: dict[str, Any]) -> Evidence:
    return Evidence(**{**data, "kind": Kind(data["kind"]), "place": place_from(data["place"])})


def root_cause_from(data: dict[str, Any]) -> RootCause:
    hung = tuple(member_from(item) for item in data["hung"])
    return RootCause(**{**data, "kind": Kind(data["kind"]), "hung": hung})
