"""Why a job ended: evidence from ranks, and the one root_cause made of it. Pure; no sockets, no
clocks.

When a rank dies, the others see their collectives break and the launcher signals everybody, so
evidence comes in several forms at once. `Kind` orders them by nearness to the root cause; `judge`
keeps the nearest.
"""

from __future__ import annotations

import enum
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sps2_mega.errors import CheckpointError, ConfigError, RankFailure

FAILURE_EXIT_CODE = 1
# How the transports say that a peer, and not the rank itself, is the trouble.
_LOST_PEER_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "remote process exited",
    "network error",
    "socket timeout",
    "timed out waiting",
)


class Kind(enum.IntEnum):
    """Sorted: a lower kind explains the higher ones."""

    DIED = 0
    RAISED = 1
    HUNG = 2
    OVERDUE = 3
    LOST_PEER = 4
    SIGNALLED = 5

    @property
    def is_root_cause(self) -> bool:
        return self < Kind.LOST_PEER


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank's process. `start_ticks` tells it from a later process with the same pid; `node_label`
    is what people read. Two members are on one node iff `node` is equal."""

    rank: int
    node: tuple[str, int]  # host name (shared by network namespaces), node rank
    node_label: str
    pid: int
    start_ticks: int

    def __str__(self) -> str:
        return f"rank {self.rank} (node {self.node_label}, pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank is doing: a step of the engine, or something outside steps."""

    step: int | None
    what: str

    def __str__(self) -> str:
        return f"during {self.what}" if self.step is None else f"step {self.step} ({self.what})"

    @property
    def adverbial(self) -> str:
        return str(self) if self.step is None else f"in {self}"


# A rank that has started and is in no step, such as an idle server's.
WAITING = Place(None, "the wait for work")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    kind: Kind
    rank: int
    place: Place
    cause: str
    exit_code: int = FAILURE_EXIT_CODE


@dataclass(frozen=True, slots=True, kw_only=True)
class RootCause:
    """What every rank does: say `message` (one rank per node), kill what hangs on its node, exit.

    `culprit` prints its own traceback, if it has one. `hung` are processes that may not end by
    themselves.
    """

    kind: Kind
    message: str
    culprit: int
    exit_code: int
    hung: tuple[Member, ...] = ()


def kind_of(exception: BaseException) -> Kind:
    """RAISED, or LOST_PEER where the text is a transport's complaint about somebody else."""
    text = str(exception).lower()
    lost = isinstance(exception, (ConnectionError, RuntimeError)) and any(
        words in text for words in _LOST_PEER_WORDS
    )
    return Kind.LOST_PEER if lost else Kind.RAISED


def cause_of(exception: BaseException, limit: int | None = 500) -> str:
    """`Type: message`; the message's first line, shortened to `limit` characters, or all of it."""
    message = str(exception).strip()
    name = type(exception).__name__
    if limit is None or not message:
        return f"{name}: {message}" if message else name
    text = f"{name}: {message.splitlines()[0]}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def traceback_of(exception: BaseException) -> str | None:
    """None for errors of the user's input: their message says it all, and a traceback would hide
    it."""
    if isinstance(exception, (ConfigError, CheckpointError, RankFailure)):
        return None
    return "".join(traceback.format_exception(exception))


def judge(
    evidence: Sequence[Evidence],
    members: Mapping[int, Member],
    places: Mapping[int, Place],
    *,
    step_timeout: float,
) -> RootCause:
    """The root_cause for non-empty `evidence`. `places` are where ranks were last; a rank that
    never connected has no member."""
    kind = min(item.kind for item in evidence)
    concerned = [
        e for e in evidence if e.kind == kind
    ]  # as it arrived: the first may have caused the rest
    if kind in (Kind.DIED, Kind.HUNG, Kind.OVERDUE):
        concerned.sort(key=lambda e: e.rank)
    first = concerned[0]
    if kind == Kind.OVERDUE:
        message = _overdue_text(concerned, members, places, step_timeout)
    else:
        message = _one_text(first, members)
        if len(concerned) > 1 and kind in (Kind.DIED, Kind.HUNG):
            message += f"; so did {', '.join(_who(e.rank, members) for e in concerned[1:])}"
        elif kind == Kind.RAISED:
            different = [e for e in concerned[1:] if e.cause != first.cause]
            message = "; ".join(
                [message, *(f"rank {e.rank} too: {e.cause}" for e in different[:3])]
            )
    hung = [members[e.rank] for e in concerned if e.rank in members]
    return RootCause(
        kind=kind,
        message=message,
        culprit=first.rank,
        exit_code=first.exit_code,
        hung=tuple(hung) if kind == Kind.HUNG else (),
    )


def _who(rank: int, members: Mapping[int, Member]) -> str:
    return str(members[rank]) if rank in members else f"rank {rank}"


def _one_text(evidence: Evidence, members: Mapping[int, Member]) -> str:
    verb = {
        Kind.DIED: "died",
        Kind.RAISED: "failed",
        Kind.HUNG: "stopped answering",
        Kind.LOST_PEER: "lost its peers",
        Kind.SIGNALLED: "was told to stop",
    }[evidence.kind]
    return f"{_who(evidence.rank, members)} {verb} {evidence.place.adverbial}: {evidence.cause}"


def _overdue_text(
    overdue: Sequence[Evidence],
    members: Mapping[int, Member],
    places: Mapping[int, Place],
    step_timeout: float,
) -> str:
    """Names who is in the earliest step that did not end, then where the others are: who is behind,
    or outside the step, is often whom the rest wait for."""
    ranks_at: dict[Place, list[int]] = {}
    for rank, place in sorted({**places, **{e.rank: e.place for e in overdue}}.items()):
        ranks_at.setdefault(place, []).append(rank)
    first = min((e.place for e in overdue), key=lambda place: place.step or 0)
    unfinished = ", ".join(_who(rank, members) for rank in ranks_at.pop(first))
    text = f"{first} did not end within {step_timeout:g} s on {unfinished}"
    elsewhere = (
        f"{place.adverbial}: {', '.join(_who(rank, members) for rank in ranks)}"
        for place, ranks in ranks_at.items()
    )
    return "; ".join([text, *elsewhere])
