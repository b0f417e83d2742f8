"""The stage order as a list, and the conditions that every list satisfies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2_mega.attention.pipeline.schedule import (
    Action,
    Phase,
    inputs_by_heads_and_queries,
    stage_order,
)


def words(stages):
    return [
        " ".join(
            x
            for x in (s.action, "out" if s.phase is Phase.SCATTER else s.part, str(s.micro_batch))
            if x
        )
        for s in stages
    ]


def test_without_overlap_everything_comes_is_computed_and_goes():
    assert words(stage_order(inputs_by_heads_and_queries(1, 1))) == [
        "post k 0",
        "post q 0",
        "post v 0",
        "wait k 0",
        "wait q 0",
        "wait v 0",
        "compute 0",
        "post out 0",
        "wait out 0",
    ]


def test_one_group_of_heads_in_three_parts():
    """K first, then the first queries, then V, then the other queries."""
    assert words(stage_order(inputs_by_heads_and_queries(1, 3))) == [
        "post k 0",
        "post q 0",
        "post v 0",
        "post q 1",
        "wait k 0",
        "wait q 0",
        "wait v 0",
        "compute 0",
        "post out 0",
        "post q 2",
        "wait q 1",
        "compute 1",
        "post out 1",
        "wait out 0",
        "wait q 2",
        "compute 2",
        "post out 2",
        "wait out 1",
        "wait out 2",
    ]


def test_a_ring_passes_on_what_has_arrived():
    stages = stage_order([(), ("kv",), ("kv",)], relayed=True, returns=False)
    assert words(stages) == [
        "post kv 1",
        "compute 0",
        "wait kv 1",
        "post kv 2",
        "compute 1",
        "wait kv 2",
        "compute 2",
    ]


@pytest.mark.parametrize("wrong", [{"ahead": -1}, {"behind": -1}, {"relayed": True, "ahead": 2}])
def test_impossible_windows_are_refused(wrong):
    with pytest.raises(ValueError, match=r"-1|2"):
        stage_order([("k",)], **wrong)


@given(
    inputs=st.lists(st.lists(st.sampled_from("kqv"), unique=True, max_size=3), max_size=9),
    ahead=st.integers(0, 4),
    behind=st.integers(0, 4),
    returns=st.booleans(),
)
def test_every_order_is_sound(inputs, ahead, behind, returns):
    stages = stage_order(inputs, ahead=ahead, behind=behind, returns=returns)
    assert len(set(stages)) == len(stages)
    place = {stage: index for index, stage in enumerate(stages)}
    computed = [s for s in stages if s.action is Action.COMPUTE]
    assert [s.micro_batch for s in computed] == list(range(len(inputs)))
    waits = [s for s in stages if s.action is Action.WAIT]
    posts = [s for s in stages if s.action is Action.POST]
    for phase in (Phase.GATHER, Phase.SCATTER):
        # Posts and waits of a direction have one order, so all ranks meet in each exchange.
        both = [
            [(s.micro_batch, s.part) for s in stages if s.phase is phase and s.action is action]
            for action in (Action.POST, Action.WAIT)
        ]
        assert both[0] == both[1]
    assert len(waits) == len(posts)
    for m, parts in enumerate(inputs):
        for part in parts:
            assert waited(place, Phase.GATHER, m, part) < place[computed[m]]
        if returns:
            assert place[computed[m]] < posted(place, Phase.SCATTER, m)
    in_flight = {Phase.GATHER: set(), Phase.SCATTER: set()}
    needed = 0
    for stage in stages:
        if stage.action is Action.POST:
            in_flight[stage.phase].add((stage.micro_batch, stage.part))
        elif stage.action is Action.WAIT:
            in_flight[stage.phase].remove((stage.micro_batch, stage.part))
        else:
            needed = stage.micro_batch
            assert len(in_flight[Phase.SCATTER]) <= behind
        assert all(m <= needed + 1 + ahead for m, _ in in_flight[Phase.GATHER])
        assert len(in_flight[Phase.SCATTER]) <= behind + 1
    assert not in_flight[Phase.GATHER] and not in_flight[Phase.SCATTER]


def posted(place, phase, m, part=""):
    return next(
        i
        for s, i in place.items()
        if (s.action, s.phase, s.micro_batch, s.part) == (Action.POST, phase, m, part)
    )


def waited(place, phase, m, part=""):
    """Index of the wait for a part; it follows the post."""
    at = next(
        i
        for s, i in place.items()
        if (s.action, s.phase, s.micro_batch, s.part) == (Action.WAIT, phase, m, part)
    )
    assert posted(place, phase, m, part) < at
    return at
