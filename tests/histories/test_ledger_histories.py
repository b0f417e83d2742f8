"""Findable blocks: random histories of the ledger against a model."""

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from sps2_mega.kv_cache.block_chain import extend_chain
from sps2_mega.kv_cache.ledger import BlockLedger


def chain_of(tokens, block_size):
    chain = []
    extend_chain(chain, tokens, root=b"root", block_size=block_size)
    return chain


def any_spans(spans):
    return True


class LedgerHistories(RuleBasedStateMachine):
    """Sequences of few different tokens: many share a beginning. `contents` is by place."""

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
