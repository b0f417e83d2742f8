"""Random histories of the decode pool's scheduler.

No block leaks or is reused while a rank writes to it, no sequence is lost, and ranks get changes in
an order that they can follow.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sps2_mega.config import SchedulerConfig
from sps2_mega.scheduler.admission import Limits
from sps2_mega.scheduler.decode_scheduler import DecodeScheduler
from sps2_mega.types import FinishReason, PrefillItem, SamplingParams, Sequence, StepOutput

EOS = 2


def make(*, block_size=4, num_blocks=8, sp_size=1, prefix_root=None, max_len=10_000, **config):
    tokens = block_size * num_blocks * sp_size
    return DecodeScheduler(
        SchedulerConfig(**config),
        limits=Limits(
            max_model_len=max_len,
            cache_tokens=tokens,
            vocab_size=10,
            eos_token_ids=frozenset({EOS}),
        ),
        block_size=block_size,
        num_blocks=num_blocks,
        sp_size=sp_size,
        prefix_root=prefix_root,
    )


def sequence(seq_id, num_tokens, max_tokens=100, arrival=0.0):
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=[4 + i % 3 for i in range(num_tokens)],
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        max_tokens=max_tokens,
        arrival_time=arrival,
    )


def step(scheduler, token_id=5):
    plan = scheduler.plan()
    if plan is None:
        return None
    scheduler.take_changes()
    scheduler.commit(plan, StepOutput([token_id] * len(plan.decodes), [None] * len(plan.decodes)))
    return [item.seq_id for item in plan.decodes]


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


class Histories(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(2, 9),
        sp_size=st.integers(1, 3),
        max_running=st.integers(1, 5),
        sharing=st.booleans(),
    )
    def begin(self, block_size, num_blocks, sp_size, max_running, sharing):
        self.scheduler = make(
            block_size=block_size,
            num_blocks=num_blocks,
            sp_size=sp_size,
            max_running=max_running,
            prefix_root=b"root" if sharing else None,
        )
        self.cache_tokens = block_size * num_blocks * sp_size
        self.alive: dict[int, Sequence] = {}
        self.reserved: dict[int, set] = {}
        self.on_ranks: set[int] = set()
        self.next_id = 0

    @rule(
        share=st.floats(0, 1), max_tokens=st.integers(1, 30), prefill_s=st.sampled_from([0, 0.5, 9])
    )
    def add(self, share, max_tokens, prefill_s):
        new = sequence(self.next_id, 1 + int(share * (self.cache_tokens - 1)), max_tokens)
        self.next_id += 1
        self.alive[new.seq_id] = new
        self.scheduler.add(new, prefill_s=prefill_s)

    @rule()
    def reserve(self):
        for reservation in self.scheduler.reserve():
            first = reservation.num_shared_tokens // self.scheduler._ledger.block_size
            blocks = set(zip(reservation.block_ranks, reservation.block_ids, strict=True))
            written = set(
                list(zip(reservation.block_ranks, reservation.block_ids, strict=True))[first:]
            )
            for others in self.reserved.values():
                assert not blocks & others, "a block that is being written to was given away"
            self.reserved[reservation.sequence.seq_id] = written

    @rule(data=st.data())
    def start(self, data):
        if self.reserved:
            self.first_token(data.draw(st.sampled_from(sorted(self.reserved))))

    def first_token(self, seq_id):
        """The decode pool learns that nobody wants a sequence that ends with this token."""
        del self.reserved[seq_id]
        one = self.alive[seq_id]
        if len(one.output_token_ids) + 1 >= one.max_tokens or one.num_tokens >= self.cache_tokens:
            del self.alive[seq_id]
            self.scheduler.drop(seq_id)
        else:
            self.scheduler.start(seq_id, 5)

    @rule(data=st.data())
    def drop(self, data):
        if self.alive:
            seq_id = data.draw(st.sampled_from(sorted(self.alive)))
            self.reserved.pop(seq_id, None)
            del self.alive[seq_id]
            self.scheduler.drop(seq_id)

    @rule(token=st.sampled_from([5, 5, 5, EOS, None]))
    def step(self, token):
        plan = self.scheduler.plan()
        if plan is None:
            return
        for change in self.scheduler.take_changes():
            if isinstance(change, int):
                self.on_ranks.remove(change)
            else:
                assert change.seq_id not in self.on_ranks
                self.on_ranks.add(change.seq_id)
        assert {item.seq_id for item in plan.decodes} <= self.on_ranks
        output = StepOutput([token] * len(plan.decodes), [None] * len(plan.decodes))
        for item, reason in zip(plan.decodes, self.scheduler.commit(plan, output), strict=True):
            if reason is not None:
                del self.alive[item.seq_id]

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        known = set(self.scheduler._waiting) | self.scheduler._running.keys()
        assert known | self.scheduler._receiving.keys() == self.alive.keys()

    def teardown(self):
        """Whoever is left is decoded to its end once all keys have come."""
        for _ in range(3000):
            if not getattr(self, "alive", None):
                return
            self.reserve()
            for seq_id in list(self.reserved):
                self.first_token(seq_id)
            self.step(5)
        raise AssertionError(f"sequences {sorted(self.alive)} never end")


Histories.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
test_histories = Histories.TestCase
