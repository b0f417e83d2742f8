"""Two "nodes" on one machine: network namespaces joined by a virtual cable of a given speed.

    namespace sps2-XXXX-0                       namespace sps2-XXXX-1
      veth, 10.77.N.1/24  ---- tbf rate ----      veth, 10.77.N.2/24

Needs root and iproute2 (mark such tests `netns`). The host name and the process table stay shared,
so what differs between the nodes is the network alone; launchers tell them apart by the node's
rank.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """`prefix` precedes a command that runs there; `environment` directs gloo to the cable."""

    namespace: str
    interface: str
    address: str

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]

    @property
    def environment(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": self.interface, "TP_SOCKET_IFNAME": self.interface}


@contextlib.contextmanager
def two_nodes(rate: str = "1gbit") -> Iterator[tuple[Node, Node]]:
    """Builds both nodes and removes them at the end; `rate` is tc's, e.g. 1gbit."""
    tag = uuid.uuid4().hex[:4]
    subnet = os.getpid() % 250
    first, second = (
        Node(f"sps2-{tag}-{i}", f"sps2{tag}v{i}", f"10.77.{subnet}.{i + 1}") for i in range(2)
    )
    try:
        for node in (first, second):
            _run("ip", "netns", "add", node.namespace)
        _run("ip", "link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        for node in (first, second):
            _run("ip", "link", "set", node.interface, "netns", node.namespace)
            _run(*node.prefix, "ip", "address", "add", f"{node.address}/24", "dev", node.interface)
            _run(*node.prefix, "ip", "link", "set", node.interface, "up")
            _run(*node.prefix, "ip", "link", "set", "lo", "up")
            shape = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
            _run(*node.prefix, "tc", "qdisc", "add", "dev", node.interface, *shape)
        yield first, second
    finally:
        for node in (first, second):  # the veth pair goes with its namespaces
            subprocess.run(
                ["ip", "netns", "delete", node.namespace], capture_output=True, check=False
            )
        link = ["ip", "link", "delete", first.interface]  # unless they were never moved
        subprocess.run(link, capture_output=True, check=False)


def cut_cable(node: Node) -> None:
    """Takes the node's interface down: no packet, and no closed connection either, leaves it."""
    _run(*node.prefix, "ip", "link", "set", node.interface, "down")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
