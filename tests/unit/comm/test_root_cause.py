"""One root cause from contradictory evidence: causes win over effects and are named."""

from __future__ import annotations

import itertools

import pytest

from sps2_mega.comm import watchdog_wire as wire
from sps2_mega.comm.root_cause import (
    Evidence,
    Kind,
    Member,
    Place,
    cause_of,
    find_root_cause,
    kind_of,
    traceback_of,
)
from sps2_mega.errors import CheckpointError, ConfigError

STEP = Place(12, "decode")


def member(rank: int) -> Member:
    return Member(rank=rank, node=("gpu2", 1), node_label="gpu2", pid=4000 + rank, start_ticks=7)


MEMBERS = {rank: member(rank) for rank in range(4)}


def evidence(kind: Kind, rank: int, cause: str = "because", place: Place = STEP) -> Evidence:
    return Evidence(kind=kind, rank=rank, place=place, cause=cause)


def message_of(*items: Evidence, places: dict[int, Place] | None = None) -> str:
    return find_root_cause(items, MEMBERS, places or {}, step_timeout=600).message


def test_message_has_rank_node_pid_step_and_cause():
    text = message_of(evidence(Kind.DIED, 3, "connection closed (killed?)"))
    assert (
        text == "rank 3 (node gpu2, pid 4003) died in step 12 (decode): connection closed (killed?)"
    )


def test_cause_wins_over_effects_in_any_order():
    items = [
        evidence(Kind.SIGNALLED, 0, "SIGTERM"),
        evidence(Kind.LOST_PEER, 1, "RuntimeError: Connection closed by peer"),
        evidence(Kind.DIED, 2),
        evidence(Kind.OVERDUE, 3),
    ]
    for order in itertools.permutations(items):
        assert find_root_cause(order, MEMBERS, {}, step_timeout=600).culprit == 2


def test_first_exception_is_the_culprit_and_different_ones_are_added():
    root_cause = find_root_cause(
        [
            evidence(Kind.RAISED, 2, "KeyError: 'x'"),
            evidence(Kind.RAISED, 0, "ValueError: y"),
            evidence(Kind.RAISED, 1, "KeyError: 'x'"),
        ],
        MEMBERS,
        {},
        step_timeout=600,
    )
    assert root_cause.culprit == 2
    assert root_cause.message.endswith(
        "failed in step 12 (decode): KeyError: 'x'; rank 0 too: ValueError: y"
    )


def test_several_deaths_are_all_named():
    text = message_of(evidence(Kind.DIED, 3), evidence(Kind.DIED, 1))
    assert text.startswith("rank 1 (") and text.endswith("; so did rank 3 (node gpu2, pid 4003)")


def test_only_silent_ranks_are_killed():
    hung = find_root_cause(
        [evidence(Kind.HUNG, 1), evidence(Kind.HUNG, 9)], MEMBERS, {}, step_timeout=600
    )
    assert hung.hung == (MEMBERS[1],)
    assert find_root_cause([evidence(Kind.DIED, 1)], MEMBERS, {}, step_timeout=600).hung == ()


def test_overdue_names_the_earliest_step_and_where_the_others_are():
    text = message_of(
        evidence(Kind.OVERDUE, 0, place=Place(13, "decode")),
        evidence(Kind.OVERDUE, 1),
        places={0: Place(13, "decode"), 1: STEP, 2: Place(None, "loading")},
    )
    assert text == (
        "step 12 (decode) did not end within 600 s on rank 1 (node gpu2, pid 4001); "
        "in step 13 (decode): rank 0 (node gpu2, pid 4000); "
        "during loading: rank 2 (node gpu2, pid 4002)"
    )


def test_rank_that_never_connected_is_named_by_number():
    text = message_of(evidence(Kind.HUNG, 7, "did not join", place=Place(None, "start-up")))
    assert text == "rank 7 stopped answering during start-up: did not join"


@pytest.mark.parametrize(
    ("exception", "kind"),
    [
        (RuntimeError("[tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:1"), Kind.LOST_PEER),
        (ConnectionResetError("connection reset by peer"), Kind.LOST_PEER),
        (RuntimeError("CUDA out of memory"), Kind.RAISED),
        (ValueError("text says: broken pipe"), Kind.RAISED),
    ],
)
def test_transport_complaints_are_told_from_own_errors(exception, kind):
    assert kind_of(exception) is kind


def test_cause_is_one_bounded_line():
    assert cause_of(ValueError("one\ntwo")) == "ValueError: one"
    assert cause_of(KeyError()) == "KeyError"
    assert len(cause_of(ValueError("x" * 9000))) == 500
    assert cause_of(ConfigError("one\ntwo"), None) == "ConfigError: one\ntwo"


def test_errors_of_the_users_input_have_no_traceback():
    assert traceback_of(CheckpointError("missing: a.weight")) is None
    assert "ValueError: x" in (traceback_of(ValueError("x")) or "")


def test_wire_keeps_every_field():
    item = evidence(Kind.OVERDUE, 2, place=Place(None, "start-up"))
    root_cause = find_root_cause([evidence(Kind.HUNG, 1)], MEMBERS, {}, step_timeout=600)
    assert wire.evidence_from(wire.to_json(item)) == item
    assert wire.root_cause_from(wire.to_json(root_cause)) == root_cause
    assert wire.member_from(wire.to_json(MEMBERS[1])) == MEMBERS[1]
