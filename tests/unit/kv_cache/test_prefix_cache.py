"""Findable blocks: random histories of the ledger against a model; kept blocks of an allocator."""

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from sps2_mega.kv_cache.allocator import BlockAllocator
from sps2_mega.kv_cache.block_chain import extend_chain
from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.kv_cache.prefix_cache import PrefixCache


def chain_of(tokens, block_size):
    chain = []
    extend_chain(chain, tokens, root=b"root", block_size=block_size)
    return chain


def any_spans(spans):
    return True


class LedgerHistories(RuleBasedStateMachine):
    """Sequences of few different tokens, so that many share a prefix.

    `contents` maps each place to its content.
    """

    sequences = Bundle("sequences")

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(2, 12),
        sp_size=st.integers(1, 3),
        layout=st.sampled_from(["contiguous", "zigzag", "striped"]),
    )
    def start(self, block_size, num_blocks, sp_size, layout):
        self.ledger = BlockLedger(
            num_blocks=num_blocks, sp_size=sp_size, block_size=block_size, layout=layout
        )
        self.block_size = block_size
        self.contents: dict[tuple[int, int], tuple] = {}
        self.texts: dict[int, tuple[list[int], tuple[int, ...] | None]] = {}
        self.next_id = 0

    def write(self, seq_id, first_block):
        table, (text, spans) = self.ledger.table(seq_id), self.texts[seq_id]
        for index in range(first_block, table.num_blocks):
            tokens = tuple(text[: (index + 1) * self.block_size])
            self.contents[table.ranks[index], table.block_ids[index]] = (spans, tokens)

    @rule(
        target=sequences,
        text=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        spans=st.sampled_from([None, (4,), (9,)]),
        spare=st.integers(0, 2),
    )
    def admit(self, text, spans, spare):
        self.next_id += 1
        usable = chain_of(text, self.block_size)[: (len(text) - 1) // self.block_size]
        prefix = self.ledger.find_prefix(usable, lambda other: other == spans)
        free = self.ledger.num_free
        table = self.ledger.admit(self.next_id, len(text), spare_blocks=spare, prefix=prefix)
        if table is None:
            assert free < self.ledger.blocks_for(len(text)) + spare, "there was room"
            return self.next_id
        self.texts[self.next_id] = (text, spans)
        for index, block in enumerate(prefix):
            assert (table.ranks[index], table.block_ids[index]) == (block.sp_rank, block.block_id)
        self.write(self.next_id, len(prefix))
        if prefix:
            event("shared")
        return self.next_id

    @rule(seq_id=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def grow(self, seq_id, tokens):
        if seq_id not in self.texts:
            return
        table = self.ledger.table(seq_id)
        before = len(self.texts[seq_id][0]) // self.block_size
        self.texts[seq_id][0].extend(tokens)
        while table.capacity < len(self.texts[seq_id][0]):
            if self.ledger.grow(seq_id) is None:
                assert self.ledger.num_free == 0
                del self.texts[seq_id][0][table.capacity :]
        self.write(seq_id, before)

    @rule(seq_id=sequences)
    def publish(self, seq_id):
        if seq_id in self.texts:
            text, spans = self.texts[seq_id]
            self.ledger.publish(seq_id, chain_of(text, self.block_size), spans)

    @rule(seq_id=consumes(sequences))
    def release(self, seq_id):
        if self.texts.pop(seq_id, None) is not None:
            self.ledger.release(seq_id)

    @invariant()
    def every_table_and_every_findable_block_holds_its_text(self):
        if not hasattr(self, "ledger"):
            return
        self.ledger.check_integrity()
        for seq_id, (text, spans) in self.texts.items():
            table = self.ledger.table(seq_id)
            for index, place in enumerate(zip(table.ranks, table.block_ids, strict=True)):
                held = self.contents[place]
                assert held == (spans, tuple(text[: (index + 1) * self.block_size]))
        for spans, text in list(self.contents.values()):
            chain = chain_of(text, self.block_size)
            found = self.ledger.find_prefix(chain, lambda s: s == spans)  # noqa: B023
            for index, block in enumerate(found):
                held = self.contents[block.sp_rank, block.block_id]
                assert held == (spans, text[: (index + 1) * self.block_size])

    def teardown(self):
        for seq_id in list(getattr(self, "texts", ())):
            self.ledger.release(seq_id)
        if hasattr(self, "ledger"):
            assert self.ledger.num_free == self.ledger.num_blocks
            self.ledger.check_integrity()


TestLedgerHistories = LedgerHistories.TestCase
TestLedgerHistories.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,  # the machine may be busy
    suppress_health_check=[HealthCheck.too_slow],
)


def test_kept_blocks_are_free_but_not_empty_and_evicted_in_the_order_of_their_release():
    allocator = BlockAllocator(5)
    ids = allocator.allocate(4)
    for block_id in ids[1:]:
        allocator.keep(block_id)
    allocator.free([3, 1])
    allocator.free([0, 2])
    assert (allocator.num_free, allocator.num_empty, allocator.num_used) == (5, 2, 0)
    assert allocator.next_to_evict() == 3 and not allocator.is_evictable(0)
    allocator.check_integrity()
    allocator.share([3])
    assert (allocator.num_free, allocator.next_to_evict(), allocator.ref_count(3)) == (4, 1, 1)
    allocator.forget(1)
    assert (allocator.num_free, allocator.num_empty) == (4, 3)
    allocator.forget(3)
    allocator.free([3])
    assert (allocator.num_free, allocator.num_empty) == (5, 4)
    allocator.check_integrity()
    with pytest.raises(AssertionError, match="cannot forget block 3: it is not kept"):
        allocator.forget(3)
    with pytest.raises(AssertionError, match="cannot keep block 0: it is free already"):
        allocator.keep(0)


def test_removing_a_block_takes_what_follows_it_on_all_ranks():
    chain, other = chain_of([1, 2, 3, 4, 5], 1), chain_of([1, 2, 9], 1)
    cache = PrefixCache()
    for index in range(5):
        cache.add(chain, index, None, (index % 2, index))
    cache.add(other, 2, None, (2, 7))
    assert [block.block_id for block in cache.find(chain, any_spans)] == [0, 1, 2, 3, 4]
    assert [block.block_id for block in cache.find(other, any_spans)] == [0, 1, 7]
    assert set(cache.remove((0, 2))) == {(0, 2), (1, 3), (0, 4)}
    assert len(cache.find(chain, any_spans)) == 2 and len(cache.find(other, any_spans)) == 3
    cache.check_integrity()
    assert set(cache.remove((0, 0))) == {(0, 0), (1, 1), (2, 7)}
    assert len(cache) == 0 and cache.find(other, any_spans) == []
    cache.check_integrity()


def test_the_longest_of_several_spans_wins_and_refused_ones_are_not_seen():
    chain = chain_of(range(6), 2)
    cache = PrefixCache()
    for spans, count in (((4,), 1), ((8,), 3), (None, 2)):
        for index in range(count):
            cache.add(chain, index, spans, (count, index))
    assert [b.spans for b in cache.find(chain, any_spans)] == [(8,)] * 3
    assert [b.spans for b in cache.find(chain, lambda s: s != (8,))] == [None] * 2
    assert cache.find(chain, lambda s: False) == [] and cache.find([], any_spans) == []
    assert (cache.num_findable(chain, (4,)), cache.num_findable(chain, (5,))) == (1, 0)
