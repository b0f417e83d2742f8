"""Watchdog that ends the whole job, on all nodes, when a rank dies, hangs or raises.

Launchers stop at best the ranks of their own node. Here every rank, including rank 0, keeps a
connection to a hub in rank 0 (`watchdog_hub`). A daemon thread sends heartbeats and carries out the
hub's decision, even while the main thread is inside a collective, so that all ranks end for one
reason. If rank 0 itself is lost, each rank decides alone, from the same fact.

    watchdog = Watchdog.start(info, publish=..., lookup=..., step_timeout=600)
    watchdog.wait_for_work()      # started; idle time from here on belongs to no step
    watchdog.step_begin(12, "decode"); ...; watchdog.step_end()
    watchdog.fail(error)          # an exception: never returns
    watchdog.close()              # a clean end, on all ranks in any order

Signals and dead launchers are left to `guard`.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from sps2_mega.comm import crash_report
from sps2_mega.comm import watchdog_wire as wire
from sps2_mega.comm.process_facts import own_member
from sps2_mega.comm.root_cause import (
    FAILURE_EXIT_CODE,
    WAITING,
    Evidence,
    Kind,
    Member,
    Place,
    RootCause,
    cause_of,
    find_root_cause,
    kind_of,
    traceback_of,
)
from sps2_mega.comm.watchdog_address import HubAddress, listen
from sps2_mega.comm.watchdog_hub import MISSED_BEATS, Hub, Limits, silence_text
from sps2_mega.comm.watchdog_wire import LineSocket
from sps2_mega.parallel.launcher import LaunchInfo

FAREWELL_S = 2.0
# Between two steps of a busy engine a rank still counts as in the step it just ended,
# which best tells where it was when it died.
WAITING_AFTER_S = 1.0
ANSWER_S = 2.5  # for the hub to answer evidence, including its longest window
# Signals and uncaught exceptions concern the process and not an
# object, so `guard` finds watchdogs here.
_active: set[Watchdog] = set()


def active_watchdogs() -> tuple[Watchdog, ...]:
    return tuple(_active)


class Watchdog:
    """A rank's part in a job: until `close`, the job is healthy or this process ends in seconds."""

    @classmethod
    def start(
        cls,
        info: LaunchInfo,
        *,
        publish: Callable[[str], None],
        lookup: Callable[[], str],
        step_timeout: float = 600.0,
        heartbeat_timeout: float = 8.0,
        start_timeout: float = 60.0,
        close_timeout: float = 30.0,
    ) -> Watchdog:
        """Connect this rank; call it on every rank as soon as they can exchange a string.

        Args:
            info: place of this process in the job.
            publish: called once, on rank 0, with the hub's address; not called for a single rank.
            lookup: called on every other rank; waits for that address and returns it.
            step_timeout: seconds until a step that has not ended ends the job.
            heartbeat_timeout: seconds of silence after which a rank counts as hung.
            start_timeout: seconds for all ranks to connect.
            close_timeout: seconds for all ranks to close after rank 0.

        Raises:
            RankFailure: the hub on rank 0 cannot be reached.
        """
        limits = Limits(
            interval=min(1.0, heartbeat_timeout / 8),
            heartbeat=heartbeat_timeout,
            step=step_timeout,
            start=start_timeout,
            close=close_timeout,
        )
        member = own_member(info)
        if info.rank > 0:
            address = HubAddress.decode(lookup())
            link = LineSocket(address.connect(timeout_s=heartbeat_timeout))
            return cls(info, member, link, address=address, limits=limits)
        listener, address = listen(info, member)
        ours, hubs = socket.socketpair()
        self = cls(info, member, LineSocket(ours), address=address, limits=limits)
        self._hub = Hub(
            world_size=info.world_size,
            token=address.token,
            own_link=hubs,
            listener=listener,
            limits=limits,
            place_now=lambda: self._place_now,
        )
        self._hub.start()
        if info.world_size > 1:
            publish(address.encode())
        return self

    def __init__(
        self,
        info: LaunchInfo,
        member: Member,
        link: LineSocket,
        *,
        address: HubAddress,
        limits: Limits,
    ) -> None:
        self._info = info
        self._member = member
        self._link = link
        self._address = address
        self._limits = limits
        self._hub: Hub | None = None
        self._place = Place(None, "start-up")
        self._step_began: float | None = None
        self._step_ended: float | None = None
        self._overdue_place: Place | None = None
        self._traceback: str | None = None
        self._finishing = False
        self._heard = time.monotonic()  # from the hub
        self._ending = threading.Lock()  # taken by the thread that ends the process, never released
        link.send("hello", token=address.token, member=wire.to_json(member))
        self._thread = threading.Thread(target=self._watch, name="sps2-watchdog", daemon=True)
        self._thread.start()
        _active.add(self)

    @property
    def is_alone(self) -> bool:
        """Whether this rank is the only one of the job."""
        return self._info.world_size == 1

    def at(self, step: int | None, what: str) -> None:
        """Record this rank's activity, for messages: a step's number, or None outside steps."""
        self._step_ended = None
        self._place = Place(step, what)

    def wait_for_work(self) -> None:
        """Record that this rank has started, or is idle until its next step."""
        self._step_ended = None
        self._place = WAITING

    def step_begin(self, step: int, what: str) -> None:
        """Record the start of a step, which must end within `step_timeout`."""
        self._step_ended = None
        self._place = Place(step, what)
        self._step_began = time.monotonic()

    def step_end(self) -> None:
        """End the step; without another one the rank counts as waiting `WAITING_AFTER_S` later."""
        self._step_began, self._step_ended = None, time.monotonic()

    def fail(self, exception: BaseException) -> NoReturn:
        """End the job because of `exception`, or of another rank if that is the root cause."""
        self._traceback = traceback_of(exception)
        self._end_with(kind_of(exception), cause_of(exception))

    def stop(self, cause: str, exit_code: int) -> NoReturn:
        """End the job because a signal or a dead launcher told this process to stop."""
        self._end_with(Kind.SIGNALLED, cause, exit_code)

    def close(self) -> None:
        """End cleanly. Rank 0 returns when all ranks have called it, every other rank at once."""
        if self._finishing:
            return
        self._step_began = self._step_ended = None
        self._place = Place(None, "shutdown")
        self._finishing = True
        self._link.send("goodbye")
        if self._hub is not None:
            self._hub.close_when_all_finished()
        self._thread.join(FAREWELL_S)
        self._link.close()
        _active.discard(self)

    def _end_with(self, kind: Kind, cause: str, exit_code: int = FAILURE_EXIT_CODE) -> NoReturn:
        evidence = self._own_evidence(kind, cause, exit_code)
        if self._link.send("evidence", evidence=wire.to_json(evidence)):
            time.sleep(ANSWER_S)  # the hub's decision ends the process, from the other thread
        items, silence = [evidence], time.monotonic() - self._heard
        if kind == Kind.LOST_PEER and silence > MISSED_BEATS * self._limits.interval:
            hung = Evidence(
                kind=Kind.HUNG, rank=0, place=evidence.place, cause=silence_text(silence)
            )
            items.append(hung)
        self._carry_out(self._decide_alone(*items))

    @property
    def _place_now(self) -> Place:
        ended, place = self._step_ended, self._place
        waits = ended is not None and time.monotonic() - ended > WAITING_AFTER_S
        return WAITING if waits else place

    def _own_evidence(self, kind: Kind, cause: str, exit_code: int = FAILURE_EXIT_CODE) -> Evidence:
        rank, place = self._info.rank, self._place_now
        return Evidence(kind=kind, rank=rank, place=place, cause=cause, exit_code=exit_code)

    def _decide_alone(self, *evidence: Evidence) -> RootCause:
        known = {0: self._address.member, self._info.rank: self._member}
        return find_root_cause(evidence, known, {}, step_timeout=self._limits.step)

    def _watch(self) -> None:
        """Loop of the daemon thread.

        It sends heartbeats, reports an overdue step, carries out the hub's
        decision and notices the loss of the hub.
        """
        poller = select.poll()
        poller.register(self._link, select.POLLIN)
        self._heard = tick = next_beat = time.monotonic()
        while True:
            ready = poller.poll(self._limits.interval * 1000 / 4)
            now = time.monotonic()
            if now - tick > self._limits.heartbeat / 2:
                self._heard = now  # this process itself was stopped: see Hub._forgive
            tick = now
            if ready:
                self._heard = now
                messages, is_open = self._link.receive()
                if self._obey(messages):
                    return
                if not is_open:
                    if self._finishing:
                        return
                    self._lose_hub(Kind.DIED, "connection closed (killed?)")
            if now - self._heard > self._limits.heartbeat:
                self._lose_hub(Kind.HUNG, silence_text(self._limits.heartbeat))
            if now >= next_beat:
                next_beat = now + self._limits.interval
                self._link.send("beat", place=wire.to_json(self._place_now))
            self._look_at_step(now)

    def _obey(self, messages: list[dict[str, Any]]) -> bool:
        """Handle messages of the hub; True if it released this rank.

        Rank 0 stays until the hub itself ends.
        """
        for message in messages:
            if message["kind"] == "root_cause":
                self._carry_out(wire.root_cause_from(message["root_cause"]))
        return self._hub is None and any(message["kind"] == "farewell" for message in messages)

    def _look_at_step(self, now: float) -> None:
        began, place = self._step_began, self._place
        if began is None or now - began <= self._limits.step or place == self._overdue_place:
            return
        self._overdue_place = place
        evidence = self._own_evidence(Kind.OVERDUE, f"not finished after {self._limits.step:g} s")
        self._link.send("evidence", evidence=wire.to_json(evidence))

    def _lose_hub(self, kind: Kind, cause: str) -> NoReturn:
        self._carry_out(
            self._decide_alone(Evidence(kind=kind, rank=0, place=self._place_now, cause=cause))
        )

    def _carry_out(self, root_cause: RootCause) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * ANSWER_S)  # another thread is ending this process
            crash_report.leave(root_cause.exit_code)
        since = time.monotonic()
        if self._traceback and root_cause.culprit == self._info.rank:
            crash_report.write_error(self._traceback)
        # The lowest surviving rank of the node speaks; without the hub nobody knows who survives.
        time.sleep(min(0.02 * self._info.local_rank, 0.3))
        claim = crash_report.SpeakerClaim(f"{self._address.token}-{self._info.node_rank}")
        if claim.held:
            crash_report.write_error(f"sps2_mega: {root_cause.message}")
            if root_cause.kind == Kind.OVERDUE:
                crash_report.write_main_stack(self._member)
            for member in root_cause.hung:
                if member.node == self._member.node and member != self._member:
                    crash_report.kill_hung(member)
        crash_report.tell_listeners(root_cause.message)
        crash_report.hold_claim_then_leave(since, root_cause.exit_code)
