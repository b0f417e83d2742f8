"""Random histories of a decode pool's scheduler: no block leaks
or is reused while a rank writes to it, no sequence is lost, and ranks get changes in an order that
they can follow."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sps2_mega.types import Sequence, StepOutput
from tests.unit.scheduler.decode_pool import make, sequence

EOS = 2


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
