"""Nodes of an emulated cluster: network namespaces around a switch, with shaped links.

    node 0 [uplink] ---- [port0]             tbf at both ends of every link limits what a node sends
    node 1 [uplink] ---- [port1] switch      and what it receives alike
    node 2 [uplink] ---- [port2]

Only the network is separate: processes of all nodes share the machine's cores, memory and files.
Namespaces are named after this process and removed at the end; no other one is touched. Needs root
and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# The bucket must hold a window of packets that a kernel passes down as one.
_LEAST_BURST = 64 * 1024
_BURST_S = 0.001
_QUEUE_S = 0.2
# Settings that differ among machines. Reno is in every kernel, is the only algorithm that a
# namespace may always take, and fills links that lose nothing. An idle job must not begin its next
# prompt with a slow start.
_SETTINGS = ("net.ipv4.tcp_congestion_control=reno", "net.ipv4.tcp_slow_start_after_idle=0")


class ClusterError(Exception):
    """This machine cannot emulate the cluster; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Shape of every node's link, per direction; `bits_per_s` None leaves the rate free."""

    bits_per_s: float | None = None
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Node:
    """One namespace; `prefix` runs a command in it, `environment` directs gloo to the link."""

    namespace: str
    address: str

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]

    @property
    def environment(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": "uplink", "TP_SOCKET_IFNAME": "uplink"}


@dataclass(frozen=True, slots=True)
class Cluster:
    nodes: tuple[Node, ...]
    switch: str

    def set_link(self, link: Link) -> None:
        """Shape the links of all nodes, also while jobs run."""
        for number, node in enumerate(self.nodes):
            _shape(node.namespace, "uplink", link)
            _shape(self.switch, f"port{number}", link)


def require_means() -> None:
    """Check that namespaces can be made here.

    Raises:
        ClusterError: a program or root is missing.
    """
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise ClusterError(f"{' and '.join(missing)} not found: iproute2 is needed")
    if os.geteuid() != 0:
        raise ClusterError(
            f"network namespaces need root, this is user id {os.geteuid()}: run it with sudo"
        )


@contextmanager
def emulated_cluster(num_nodes: int) -> Iterator[Cluster]:
    """Make `num_nodes` nodes with free links, and remove them however the context ends.

    Raises:
        ClusterError: the machine does not let us; the failing command is named.
    """
    require_means()
    tag = f"sps2-bench-{os.getpid()}-{uuid.uuid4().hex[:4]}"
    switch = f"{tag}-switch"
    nodes = tuple(Node(f"{tag}-{i}", f"10.78.0.{i + 1}") for i in range(num_nodes))
    made: list[str] = []
    with exit_on_sigterm():
        try:
            for namespace in (switch, *(node.namespace for node in nodes)):
                made.append(namespace)
                _run("ip", "netns", "add", namespace)
            _inside(switch, "ip", "link", "add", "switch", "type", "bridge")
            _inside(switch, "ip", "link", "set", "switch", "up")
            for number, node in enumerate(nodes):
                _connect(node, switch, f"port{number}")
            yield Cluster(nodes, switch)
        finally:
            for namespace in made:  # deleting one removes its links
                delete = ["ip", "netns", "delete", namespace]
                subprocess.run(delete, capture_output=True, check=False)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit meanwhile, so that contexts clean up behind themselves."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def shaping_commands(device: str, link: Link) -> list[list[str]]:
    """Arguments of tc that replace `device`'s shaping by the link's rate and latency."""
    commands, parent = [], ["root", "handle", "1:"]
    if link.latency_s:
        delay = ["netem", "delay", f"{round(link.latency_s * 1e6)}us", "limit", "100000"]
        commands.append(["qdisc", "replace", "dev", device, *parent, *delay])
        parent = ["parent", "1:1", "handle", "2:"]
    if link.bits_per_s is not None:
        burst = max(_LEAST_BURST, round(link.bits_per_s / 8 * _BURST_S))
        rate = ["tbf", "rate", f"{round(link.bits_per_s)}bit", "burst", str(burst)]
        queue = ["latency", f"{round(_QUEUE_S * 1e3)}ms"]
        commands.append(["qdisc", "replace", "dev", device, *parent, *rate, *queue])
    return commands


def _shape(namespace: str, device: str, link: Link) -> None:
    remove = [*_within(namespace), "tc", "qdisc", "del", "dev", device, "root"]
    subprocess.run(remove, capture_output=True, check=False)  # there may be none
    for command in shaping_commands(device, link):
        try:
            _inside(namespace, "tc", *command)
        except ClusterError as error:
            kind = "latency (netem)" if "netem" in command else "rate (tbf)"
            raise ClusterError(f"{error}; this kernel may not know how to limit a {kind}") from None


def _connect(node: Node, switch: str, port: str) -> None:
    inside = _within(node.namespace)
    peer = ["peer", "name", port, "netns", switch]
    _run(*inside, "ip", "link", "add", "uplink", "type", "veth", *peer)
    _run(*inside, "ip", "address", "add", f"{node.address}/24", "dev", "uplink")
    _run(*inside, "ip", "link", "set", "lo", "up")
    _run(*inside, "ip", "link", "set", "uplink", "up")
    _run(*inside, "sysctl", "-q", "-w", *_SETTINGS)
    _inside(switch, "ip", "link", "set", port, "master", "switch", "up")


def _within(namespace: str) -> list[str]:
    return ["ip", "netns", "exec", namespace]


def _inside(namespace: str, *command: str) -> None:
    _run(*_within(namespace), *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


def parse_rate(text: str) -> float | None:
    """Bits per second of `10gbit`, `62.5mbit`, `800kbit`; None for `free`.

    Raises:
        ValueError: it is none of these.
    """
    if text == "free":
        return None
    for unit, factor in (("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9)):
        if text.lower().endswith(unit):
            rate = float(text[: -len(unit)]) * factor
            if rate > 0:
                return rate
    raise ValueError(f"a link rate is e.g. 10gbit, 62.5mbit or free, got {text!r}")


def rate_name(bits_per_s: float | None) -> str:
    """Inverse of `parse_rate`, to three digits."""
    if bits_per_s is None:
        return "free"
    unit, factor = ("gbit", 1e9) if bits_per_s >= 1e9 else ("mbit", 1e6)
    return f"{bits_per_s / factor:.3g}{unit}"


def parse_rates(texts: Sequence[str]) -> list[float | None]:
    """Distinct rates, fastest first; the free link leads."""
    rates = {parse_rate(text) for text in texts}
    return sorted(rates, key=lambda rate: float("inf") if rate is None else rate, reverse=True)
