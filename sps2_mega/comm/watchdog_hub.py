"""Hub of the watchdog, a thread of rank 0: watches all ranks and decides when and why the job ends.

    rank 0 --socket pair--+
    rank 1 --TCP----------+--> Hub: closed without goodbye -> DIED      no heartbeat -> HUNG
    rank 2 --TCP----------+         evidence sent by a rank -> as it says

The first evidence opens a short window for more, since effects may be heard before
their cause. Then `find_root_cause` decides and the hub sends the decision to every
rank. Rank 0 itself is a connection like any other.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sps2_mega.comm import watchdog_wire as wire
from sps2_mega.comm.root_cause import Evidence, Kind, Member, Place, find_root_cause

ROOT_CAUSE_WINDOW_S = 0.2  # others that died in the same instant
EFFECT_WINDOW_S = 1.0  # the cause of a lost connection or of a launcher's SIGTERM
# Heartbeats that a rank must have missed, when other ranks complain, to be blamed and killed.
MISSED_BEATS = 2
NOT_CONNECTED = Place(None, "start-up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits in seconds.

    interval: between heartbeats. heartbeat: of silence, until a rank counts as hung. step: until a
    step is overdue. start: for all ranks to connect. close: for all ranks to finish after rank 0.
    """

    interval: float
    heartbeat: float
    step: float
    start: float
    close: float


def silence_text(seconds: float) -> str:
    return f"no heartbeat for {seconds:.3g} s (hung, or its node is unreachable)"


class _Peer:
    """A connection and, once it has said hello, the rank behind it."""

    def __init__(self, link: wire.LineSocket) -> None:
        self.link = link
        self.member: Member | None = None
        self.place = NOT_CONNECTED
        self.heard = time.monotonic()
        self.finished = False  # said goodbye
        self.open = True


class Hub:
    """Decision maker of a job: sends one root cause, or none if every rank says goodbye."""

    def __init__(
        self,
        *,
        world_size: int,
        token: str,
        own_link: socket.socket,
        listener: socket.socket | None,
        limits: Limits,
        place_now: Callable[[], Place],
    ) -> None:
        self._world_size = world_size
        self._token = token
        self._listener = listener
        self._limits = limits
        self._place_now = place_now
        self._peers: list[_Peer] = []
        self._evidence: list[Evidence] = []
        self._decide_at: float | None = None
        self._decided = False
        self._began = time.monotonic()
        self._closing_since: float | None = None
        self._selector = selectors.DefaultSelector()
        self._accept(own_link)
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="sps2-watchdog-hub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close_when_all_finished(self) -> None:
        """Wait until every rank has said goodbye; a rank that does not becomes evidence."""
        self._closing_since = time.monotonic()
        self._thread.join()

    def _run(self) -> None:
        next_beat = tick = time.monotonic()
        while not self._all_finished():
            events = self._selector.select(self._limits.interval / 4)
            now = time.monotonic()
            if now - tick > self._limits.heartbeat / 2:
                self._forgive(now)
            tick = now
            for key, _ in events:
                if key.data is None:
                    self._accept_all()
                else:
                    self._read(key.data)
            if now >= next_beat:
                next_beat = now + self._limits.interval
                for peer in self._connected():
                    peer.link.send("beat")
            self._look_for_silence(now)
            if self._decide_at is not None and now >= self._decide_at and not self._decided:
                self._decide()
        self._close()

    def _forgive(self, now: float) -> None:
        """Reset all silence: this thread itself was stopped (Ctrl-Z, debugger, busy machine)."""
        for peer in self._peers:
            peer.heard = now

    def _connected(self) -> list[_Peer]:
        """Peers to talk to, with rank 0 even after its goodbye: it stays for all goodbyes."""
        return [peer for peer in self._peers if peer.member and peer.open]

    def _unfinished(self) -> list[_Peer]:
        return [peer for peer in self._connected() if not peer.finished]

    def _all_finished(self) -> bool:
        return sum(peer.finished for peer in self._peers) == self._world_size

    def _accept_all(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            while True:
                self._accept(self._listener.accept()[0])

    def _accept(self, sock: socket.socket) -> None:
        peer = _Peer(wire.LineSocket(sock))
        self._peers.append(peer)
        self._selector.register(peer.link, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            messages, is_open = peer.link.receive()
            for message in messages:
                self._hear(peer, message)
        except (wire.WireError, KeyError, TypeError, ValueError):
            is_open = False  # a stranger (port scan), never one of ours
        if not is_open:
            self._lose(peer)

    def _hear(self, peer: _Peer, message: dict[str, Any]) -> None:
        peer.heard = time.monotonic()
        kind = message["kind"]
        if peer.member is None:
            if kind != "hello" or message["token"] != self._token:
                raise wire.WireError("no hello")
            peer.member = wire.member_from(message["member"])
        elif kind == "beat":
            peer.place = wire.place_from(message["place"])
        elif kind == "evidence":
            evidence = wire.evidence_from(message["evidence"])
            peer.place = evidence.place
            self._add(evidence)
        elif kind == "goodbye":
            peer.finished = True
            peer.link.send("farewell")

    def _lose(self, peer: _Peer) -> None:
        self._selector.unregister(peer.link)
        peer.link.close()
        peer.open = False
        if peer.member is None:
            self._peers.remove(peer)
        elif not peer.finished:
            self._blame(peer, Kind.DIED, "connection closed (killed?)")

    def _look_for_silence(self, now: float) -> None:
        limits = self._limits
        for peer in self._unfinished():
            if now - peer.heard > limits.heartbeat:
                self._blame(peer, Kind.HUNG, silence_text(limits.heartbeat))
        late_since = self._began + limits.start
        if now > late_since and not self._evidence:
            known = {peer.member.rank for peer in self._peers if peer.member}
            for rank in sorted(set(range(self._world_size)) - known):
                cause = f"did not join the job within {limits.start:g} s"
                self._add(Evidence(kind=Kind.HUNG, rank=rank, place=NOT_CONNECTED, cause=cause))
        if self._closing_since is not None and now > self._closing_since + limits.close:
            for peer in self._unfinished():
                self._blame(peer, Kind.HUNG, f"not finished {limits.close:g} s after rank 0")

    def _blame_the_silent(self, now: float) -> None:
        """Blame ranks that stand still for an overdue step or a lost peer.

        Both are often the effect of a rank that stands still, and
        that rank would not end by itself.
        """
        if min(evidence.kind for evidence in self._evidence) not in (Kind.OVERDUE, Kind.LOST_PEER):
            return
        for peer in self._unfinished():
            silence = now - peer.heard
            if silence > MISSED_BEATS * self._limits.interval:
                self._blame(peer, Kind.HUNG, silence_text(silence))

    def _blame(self, peer: _Peer, kind: Kind, cause: str) -> None:
        """Add evidence against a peer, at its last place or at rank 0's if that is further.

        Ranks step together, so rank 0's current place tells more than
        a heartbeat up to a second old.
        """
        assert peer.member is not None
        place, now = peer.place, self._place_now()
        if now.step is not None and (place.step is None or now.step > place.step):
            place = now
        self._add(Evidence(kind=kind, rank=peer.member.rank, place=place, cause=cause))

    def _add(self, evidence: Evidence) -> None:
        if any(e.rank == evidence.rank and e.kind <= evidence.kind for e in self._evidence):
            return
        self._evidence.append(evidence)
        window = ROOT_CAUSE_WINDOW_S if evidence.kind.is_root_cause else EFFECT_WINDOW_S
        if evidence.kind == Kind.OVERDUE:
            window = 1.5 * self._limits.interval  # the others report theirs at their next heartbeat
        due = time.monotonic() + window
        self._decide_at = due if self._decide_at is None else min(self._decide_at, due)

    def _decide(self) -> None:
        self._decided = True
        self._blame_the_silent(time.monotonic())
        members = {peer.member.rank: peer.member for peer in self._peers if peer.member}
        places = {peer.member.rank: peer.place for peer in self._peers if peer.member}
        root_cause = find_root_cause(
            self._evidence, members, places, step_timeout=self._limits.step
        )
        for peer in self._connected():
            peer.link.send("root_cause", root_cause=wire.to_json(root_cause))

    def _close(self) -> None:
        for peer in self._peers:
            peer.link.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()
