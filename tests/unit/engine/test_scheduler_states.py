"""Random histories of the scheduler against a model of the ranks: nothing leaks, nothing is lost."""

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from sps2_mega.config import SchedulerConfig
from sps2_mega.engine.scheduler import Scheduler
from sps2_mega.kv_cache.block_table import BlockTable
from sps2_mega.types import FinishReason, SamplingParams, Sequence, StepOutput

EOS, VOCAB = 3, 17


class Ranks:
    """What every rank remembers; executing a plan checks that it can be executed."""

    def __init__(self, block_size: int, num_blocks: int, sp_size: int) -> None:
        self.block_size, self.num_blocks, self.sp_size = block_size, num_blocks, sp_size
        self.tables: dict[int, BlockTable] = {}
        self.tokens: dict[int, list[int]] = {}  # cached so far

    def execute(self, plan) -> None:
        for seq_id in plan.released:
            del self.tables[seq_id], self.tokens[seq_id]
        assert bool(plan.prefills) != bool(plan.decodes)
        for item in plan.prefills:
            assert item.seq_id not in self.tables
            table = BlockTable(self.block_size)
            table.extend(item.block_ranks, item.block_ids)
            assert table.capacity - self.block_size < len(item.token_ids) <= table.capacity
            self.tables[item.seq_id], self.tokens[item.seq_id] = table, list(item.token_ids)
        for item in plan.decodes:
            table, tokens = self.tables[item.seq_id], self.tokens[item.seq_id]
            assert item.position == len(tokens), "every position is fed exactly once, in order"
            if item.new_block is not None:
                table.append(*item.new_block)
            table.locate(item.position)
            tokens.append(item.token_id)
        used = [
            (rank, block)
            for t in self.tables.values()
            for rank, block in zip(t.ranks, t.block_ids, strict=True)
        ]
        assert len(used) == len(set(used)), "a block is owned twice"
        assert all(0 <= r < self.sp_size and 0 <= b < self.num_blocks for r, b in used)


class SchedulerHistories(RuleBasedStateMachine):
    ids = Bundle("ids")

    @initialize(
        block_size=st.integers(1, 5),
        num_blocks=st.integers(1, 9),
        sp_size=st.integers(1, 4),
        max_running=st.integers(1, 6),
        max_prefill_tokens=st.integers(1, 40),
        max_model_len=st.integers(2, 60),
        layout=st.sampled_from(["contiguous", "zigzag"]),
    )
    def start(
        self,
        block_size,
        num_blocks,
        sp_size,
        max_running,
        max_prefill_tokens,
        max_model_len,
        layout,
    ):
        config = SchedulerConfig(max_running=max_running, max_prefill_tokens=max_prefill_tokens)
        self.scheduler = Scheduler(
            config,
            block_size=block_size,
            num_blocks=num_blocks,
            sp_size=sp_size,
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            layout=layout,
        )
        self.max_running = max_running
        self.ranks = Ranks(block_size, num_blocks, sp_size)
        self.live: dict[int, Sequence] = {}
        self.plan = None
        self.next_id = 0

    @rule(
        target=ids,
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
        max_tokens=st.one_of(st.none(), st.integers(1, 25)),
        ignore_eos=st.booleans(),
    )
    def add(self, prompt, max_tokens, ignore_eos):
        self.next_id += 1
        sequence = Sequence(
            seq_id=self.next_id,
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
            seed=0,
            max_tokens=max_tokens or 10_000,
            arrival_time=0.0,
        )
        if self.scheduler.add(sequence) is None:
            self.live[self.next_id] = sequence
        return self.next_id

    @rule()
    def make_plan(self):
        if self.plan is not None:
            return
        self.plan = self.scheduler.plan(0.0)
        assert (self.plan is not None) == bool(self.live)
        if self.plan is None:
            return
        self.ranks.execute(self.plan)
        if any(seq_id in self.live for seq_id in self.plan.released):
            event("preempted")
        running = self.live.keys() & self.ranks.tables.keys()
        waiting = self.live.keys() - running
        assert not waiting or max(running) < min(waiting), "first come, first served"
        for item in self.plan.prefills:
            sequence = self.live[item.seq_id]
            assert item.token_ids == sequence.prompt_token_ids + sequence.output_token_ids
        for item in self.plan.decodes:
            sequence = self.live[item.seq_id]
            cached = self.ranks.tokens[item.seq_id]
            assert cached == sequence.prompt_token_ids + sequence.output_token_ids

    @rule(data=st.data())
    def commit(self, data):
        if self.plan is not None:
            num_items = len(self.plan.prefills + self.plan.decodes)
            tokens = st.lists(st.integers(0, VOCAB - 1), min_size=num_items, max_size=num_items)
            self.commit_tokens(data.draw(tokens))

    def commit_tokens(self, tokens):
        plan, self.plan = self.plan, None
        output = StepOutput(tokens, [None] * len(tokens))
        for sequence in self.scheduler.commit(plan, output, 1.0):
            assert sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            assert len(sequence.token_times) == len(sequence.output_token_ids)
            del self.live[sequence.seq_id]

    @rule(num_steps=st.integers(1, 12), token_id=st.integers(EOS, EOS + 1))
    def run(self, num_steps, token_id):
        for _ in range(num_steps):
            self.make_plan()
            if self.plan is not None:
                self.commit_tokens([token_id] * len(self.plan.prefills + self.plan.decodes))

    @rule(seq_id=consumes(ids), by_stop_string=st.booleans())
    def end(self, seq_id, by_stop_string):
        reason = FinishReason.STOP if by_stop_string else FinishReason.ABORT
        sequence = self.live.pop(seq_id, None)
        assert self.scheduler.finish(seq_id, reason) == (sequence is not None)
        if sequence is not None:
            assert sequence.finish_reason is reason

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.live)
        assert self.scheduler.num_running <= self.max_running
        assert self.scheduler.has_work == bool(self.live)
        if not self.live:
            assert self.scheduler.kv_usage == 0.0

    def teardown(self):
        """Left alone, everything ends, and the cache is empty."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            self.make_plan()
            if self.plan is None:
                break
            self.commit_tokens([5] * len(self.plan.prefills + self.plan.decodes))
        assert not self.live and self.scheduler.kv_usage == 0.0


TestSchedulerHistories = SchedulerHistories.TestCase
TestSchedulerHistories.settings = settings(
    max_examples=400,
    stateful_step_count=60,
    deadline=None,  # the machine may be busy
    suppress_health_check=[HealthCheck.too_slow],
)
