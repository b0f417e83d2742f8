"""Root cause of a job's end, derived from the evidence of its ranks. Pure: no sockets, no clocks.

When a rank dies, the others see their collectives break and the launcher signals every
rank, so evidence arrives in several forms at once. `Kind` orders them by distance from the
root cause; `find_root_cause` keeps the nearest.
"""

from __future__ import annotations

import enum
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sps2_mega.errors import CheckpointError, ConfigError, RankFailure

FAILURE_EXIT_CODE = 1
# Texts by which transports report that a peer, and not the rank itself, has failed.
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
    """Kind of evidence, in causal order: a lower kind explains the higher ones."""

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
    """Process of a rank.

    `start_ticks` tells it from a later process with the same pid; `node_label` is for messages. Two
    members are on one node iff their `node` is equal.
    """

    rank: int
    node: tuple[str, int]  # host name (shared by network namespaces), node rank
    node_label: str
    pid: int
    start_ticks: int

    def __str__(self) -> str:
        return f"rank {self.rank} (node {self.node_label}, pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Place:
    """Activity of a rank: a step of the engine, or something outside steps."""

    step: int | None
    what: str

    def __str__(self) -> str:
        return f"during {self.what}" if self.step is None else f"step {self.step} ({self.what})"

    @property
    def adverbial(self) -> str:
        return str(self) if self.step is None else f"in {self}"


# A started rank outside any step, such as an idle server's.
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
    """Decision that every rank carries out: print (one rank per node), kill hung processes, exit.

    `culprit` also prints its own traceback, if it has one. `hung` lists
    processes that may not end by themselves.
    """

    kind: Kind
    message: str
    culprit: int
    exit_code: int
    hung: tuple[Member, ...] = ()


def kind_of(exception: BaseException) -> Kind:
    """Classify an exception: LOST_PEER if a transport's text blames a peer, RAISED otherwise."""
    text = str(exception).lower()
    lost = isinstance(exception, (ConnectionError, RuntimeError)) and any(
        words in text for words in _LOST_PEER_WORDS
    )
    return Kind.LOST_PEER if lost else Kind.RAISED


def cause_of(exception: BaseException, limit: int | None = 500) -> str:
    """Format an exception as `Type: message`.

    With a `limit` the text is the message's first line, shortened to
    `limit` characters; without one, all of it.
    """
    message = str(exception).strip()
    name = type(exception).__name__
    if limit is None or not message:
        return f"{name}: {message}" if message else name
    text = f"{name}: {message.splitlines()[0]}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def traceback_of(exception: BaseException) -> str | None:
    """Format the traceback; None for errors in the user's input, whose message is enough."""
    if isinstance(exception, (ConfigError, CheckpointError, RankFailure)):
        return None
    return "".join(traceback.format_exception(exception))


def find_root_cause(
    evidence: Sequence[Evidence],
    members: Mapping[int, Member],
    places: Mapping[int, Place],
    *,
    step_timeout: float,
) -> RootCause:
    """Find the root cause in non-empty `evidence`.

    `places` holds the last known place of each rank; a rank that never connected has no member.
    """
    kind = min(item.kind for item in evidence)
    # In order of arrival: the first may have caused the rest.
    concerned = [e for e in evidence if e.kind == kind]
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
    """Name the ranks in the earliest unfinished step, then the places of all other ranks.

    A rank that is behind, or outside the step, is often the one that the rest wait for.
    """
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
