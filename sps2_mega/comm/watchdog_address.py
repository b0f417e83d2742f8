"""Where the hub listens and how the other ranks reach it.

The hub listens on the interface of MASTER_ADDR, which every rank can reach by definition, on a free
port. The address goes through the job's own store as text, with a secret that keeps strangers out.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

from sps2_mega.comm.root_cause import Member
from sps2_mega.comm.watchdog_wire import member_from, to_json
from sps2_mega.errors import RankFailure
from sps2_mega.parallel.launcher import LaunchInfo

RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class HubAddress:
    """`member` is rank 0, so that the others can name it when it is gone."""

    host: str
    port: int
    token: str
    member: Member

    def encode(self) -> str:
        return json.dumps([self.host, self.port, self.token, to_json(self.member)])

    @classmethod
    def decode(cls, text: str) -> HubAddress:
        host, port, token, member = json.loads(text)
        return cls(host, port, token, member_from(member))

    def connect(self, *, timeout_s: float) -> socket.socket:
        """Raises:
        RankFailure: nobody answers at this address within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return socket.create_connection((self.host, self.port), timeout=timeout_s)
            except OSError as error:
                if time.monotonic() + RETRY_S > deadline:
                    raise RankFailure(
                        f"cannot reach {self.member} at {self.host}:{self.port} within "
                        f"{timeout_s:g} s: {error}; do firewalls allow TCP between the nodes?"
                    ) from error
                time.sleep(RETRY_S)


def listen(info: LaunchInfo, member: Member) -> tuple[socket.socket | None, HubAddress]:
    """A listening socket of rank 0 and the address to publish; no socket where there is one rank.

    Raises:
        RankFailure: MASTER_ADDR cannot be resolved.
    """
    listener = None if info.world_size == 1 else _bind(info)
    port = listener.getsockname()[1] if listener else 0
    return listener, HubAddress(info.master_addr, port, secrets.token_hex(16), member)


def _bind(info: LaunchInfo) -> socket.socket:
    try:
        found: Any = socket.getaddrinfo(info.master_addr, 0, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise RankFailure(f"cannot resolve MASTER_ADDR {info.master_addr!r}: {error}") from error
    family, address = found[0], found[4][0]
    everywhere = "::" if family == socket.AF_INET6 else "0.0.0.0"
    # A host's own name is often 127.0.1.1 on that host, which other nodes could not reach; and
    # behind address translation MASTER_ADDR is no interface of this host at all.
    several_nodes = info.local_world_size < info.world_size
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    choices = [everywhere] if several_nodes and loopback else [address, everywhere]
    listener = socket.socket(family, socket.SOCK_STREAM)
    for choice in choices:
        with contextlib.suppress(OSError):
            listener.bind((choice, 0))
            break
    else:
        raise RankFailure(
            f"cannot listen on {' or '.join(choices)} (MASTER_ADDR {info.master_addr})"
        )
    listener.listen(max(128, info.world_size))
    return listener
