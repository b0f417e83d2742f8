"""Address of the watchdog's hub, and the connection of other ranks to it.

The hub listens on a free port of the interface of MASTER_ADDR, which every
rank can reach by definition. The address passes through the job's own store as
text, with a secret that keeps strangers out.
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
    """Address of the hub; `member` is rank 0, so that other ranks can name it when it is lost."""

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
        """Open a connection to the hub, retrying until `timeout_s` has passed.

        Raises:
            RankFailure: the address did not answer within `timeout_s`.
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
    """Open rank 0's listening socket, if there are other ranks, and return the address to publish.

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
    # A host often resolves its own name to 127.0.1.1, which other nodes could not reach; and behind
    # address translation MASTER_ADDR is no interface of this host at all.
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
