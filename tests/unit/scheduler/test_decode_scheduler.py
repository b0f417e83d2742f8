"""The decode pool's scheduler: when a sequence is received, decoded, overtaken and preempted."""

from __future__ import annotations

import pytest

from sps2_mega.types import FinishReason, PrefillItem, StepOutput
from tests.unit.scheduler.decode_pool import make, sequence, step

EOS = 2


def test_a_sequence_is_decoded_only_after_its_keys_have_come():
    scheduler = make()
    scheduler.add(sequence(0, 5))
    (reservation,) = scheduler.reserve()
    assert len(reservation.block_ids) == 2 and reservation.num_shared_tokens == 0
    assert scheduler.plan() is None
    scheduler.start(0, 7)
    plan = scheduler.plan()
    (entering,) = scheduler.take_changes()
    assert isinstance(entering, PrefillItem)
    assert (entering.start, entering.end, len(entering.token_ids)) == (5, 5, 5)
    assert [(item.token_id, item.position) for item in plan.decodes] == [(7, 5)]


def overtaking(**config):
    """Who has blocks while a prompt of 2 s, of seven blocks, waits for one that runs, by the order
    of reservations; then who follows when that one has ended."""
    scheduler = make(num_blocks=8, **config)
    scheduler.add(sequence(0, 8))
    scheduler.reserve()
    scheduler.start(0, 5)
    scheduler.add(sequence(1, 25, arrival=1.0), prefill_s=2.0)
    scheduler.add(sequence(2, 4, arrival=6.0), prefill_s=0.5)  # keys, if 4 times: 9, 8, 9.5
    scheduler.add(sequence(3, 4, arrival=7.5), prefill_s=0.5)
    before = [one.sequence.seq_id for one in scheduler.reserve()]
    assert scheduler.reserve() == []
    for seq_id in (0, *before):
        scheduler.drop(seq_id)
    after = [one.sequence.seq_id for one in scheduler.reserve()]
    return before, after


def test_short_prompts_pass_a_long_one_without_room_as_long_as_overtake_allows():
    assert overtaking(overtake=4) == ([2], [1])
    assert overtaking(overtake=0) == ([], [1])
    assert overtaking(overtake=40) == ([2, 3], [1])


def test_who_gave_way_comes_back_before_all_others():
    scheduler = make(num_blocks=3, overtake=4)
    for seq_id in (0, 1):
        scheduler.add(sequence(seq_id, 3, arrival=1.0), prefill_s=9.0)
        scheduler.reserve()
        scheduler.start(seq_id, 5)
    scheduler.add(sequence(2, 1, arrival=2.0), prefill_s=0.0)
    while 1 in scheduler._running:
        assert step(scheduler) is not None
    scheduler.drop(0)
    assert [one.sequence.seq_id for one in scheduler.reserve()] == [1]


def test_the_youngest_that_runs_gives_way_but_never_one_that_is_being_received():
    scheduler = make(num_blocks=6)
    for seq_id, length in enumerate((4, 4)):
        scheduler.add(sequence(seq_id, length))
    for reservation in scheduler.reserve():
        scheduler.start(reservation.sequence.seq_id, 5)
    scheduler.add(sequence(2, 3))
    assert [r.sequence.seq_id for r in scheduler.reserve()] == [2]
    held = list(scheduler._receiving[2].block_ids)
    for _ in range(9):
        assert step(scheduler)
        scheduler.check_integrity()
    assert 1 not in scheduler._running and scheduler._receiving[2].block_ids == held
    assert scheduler.reserve() == []  # no room yet for the one that gave way


def test_the_last_one_waits_for_those_on_their_way_instead_of_giving_way():
    scheduler = make(num_blocks=3)
    scheduler.add(sequence(0, 3))
    scheduler.reserve()
    scheduler.start(0, 5)
    scheduler.add(sequence(1, 3))
    scheduler.reserve()
    while scheduler._ledger.num_free or scheduler._running[0].num_tokens % 4 != 1:
        assert step(scheduler) == [0]
    assert scheduler.plan() is None
    scheduler.start(1, 5)
    assert step(scheduler) == [0]  # 1 has given way
    assert list(scheduler._waiting) == [1]
    scheduler.check_integrity()


def test_room_is_made_only_as_far_ahead_as_prefill_can_choose_from():
    """Four steps' worth, where a long prompt counts as one step."""
    scheduler = make(num_blocks=200, max_prefill_tokens=10)
    for seq_id, length in enumerate((300, 15, 10, 5, 5, 5)):
        scheduler.add(sequence(seq_id, length))
    assert [r.sequence.seq_id for r in scheduler.reserve()] == [0, 1, 2, 3, 4]
    scheduler.start(3, 5)
    assert [r.sequence.seq_id for r in scheduler.reserve()] == [5]


def test_samples_of_one_prompt_share_blocks_one_after_the_other():
    scheduler = make(num_blocks=20, prefix_root=b"root")
    for seq_id in range(2):
        scheduler.add(sequence(seq_id, 11))
    assert [r.sequence.seq_id for r in scheduler.reserve()] == [0]
    scheduler.start(0, 5)
    (second,) = scheduler.reserve()
    assert second.num_shared_tokens == 8
    scheduler.start(1, 5)
    step(scheduler)
    for seq_id in range(2):
        scheduler.drop(seq_id)
    scheduler.check_integrity()
    assert not any(scheduler.kv_used_per_rank)


@pytest.mark.parametrize(
    ("token", "reason"),
    [(EOS, FinishReason.STOP), (None, FinishReason.ERROR), (5, FinishReason.LENGTH)],
)
def test_reasons_are_those_of_admission(token, reason):
    scheduler = make()
    scheduler.add(sequence(0, 1, max_tokens=2))
    scheduler.reserve()
    scheduler.start(0, 5)
    plan = scheduler.plan()
    assert scheduler.commit(plan, StepOutput([token], [None])) == [reason]
    assert not any(scheduler.kv_used_per_rank)
