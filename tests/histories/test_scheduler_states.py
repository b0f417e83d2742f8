"""Random histories of the scheduler against a model of the ranks: nothing leaks, nothing is lost,
and nobody reads another prefix's keys. Both policies, prefills whole and in slices of layers and
chunks, with and without shared prefixes, failures included."""

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from scheduled_ranks import Ranks

from sps2_mega.config import SchedulerConfig
from sps2_mega.scheduler import prompt_placement
from sps2_mega.scheduler.layer_flops import LayerFlops
from sps2_mega.scheduler.scheduler import Scheduler
from sps2_mega.types import FinishReason, SamplingParams, Sequence, StepOutput

EOS, VOCAB = 3, 17
LAYERS = 3
USUAL_CHUNK = prompt_placement.LEAST_CHUNK


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
        chunk_tokens=st.one_of(st.none(), st.integers(1, 20)),
        sharing=st.booleans(),
        spans_of=st.sampled_from([None, lambda length: (-(-length // 8) * 4,)]),
        target_ms=st.sampled_from([None, 1.0, 20.0, 1000.0]),
        overtake=st.sampled_from([0.0, 4.0]),
        sp_threshold=st.sampled_from([0, 9, 1000]),
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
        chunk_tokens,
        sharing,
        spans_of,
        target_ms,
        overtake,
        sp_threshold,
    ):
        prompt_placement.LEAST_CHUNK = 1  # the prompts are short
        policy = {} if chunk_tokens is None else dict(policy="sarathi", chunk_tokens=chunk_tokens)
        self.sliced = chunk_tokens is None and target_ms is not None
        config = SchedulerConfig(
            max_running=max_running,
            max_prefill_tokens=max_prefill_tokens,
            tbt_target_ms=target_ms if self.sliced else None,
            overtake=overtake,
            sp_threshold=sp_threshold,
            **policy,
        )
        self.scheduler = Scheduler(
            config,
            block_size=block_size,
            num_blocks=num_blocks,
            sp_size=sp_size,
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            layout=layout,
            prefix_root=b"settings" if sharing else None,
            topology_spans=spans_of,
            layer_flops=LayerFlops(num_layers=LAYERS, token_flops=1000, pair_flops=10),
        )
        self.now, self.waited = 0.0, 0
        self.chunk_tokens, self.sharing, self.spans_of = chunk_tokens, sharing, spans_of
        self.max_running = max_running
        self.ranks = Ranks(block_size, num_blocks, sp_size, LAYERS)
        self.live: dict[int, Sequence] = {}
        self.plan = None
        self.next_id = 0
        self.texts: list[list[int]] = []

    @rule(
        target=ids,
        prompt=st.one_of(
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
            st.integers(1, 30).map(lambda length: [i % 5 for i in range(length)]),
        ),
        repeat=st.booleans(),
        max_tokens=st.one_of(st.none(), st.integers(1, 25)),
        ignore_eos=st.booleans(),
    )
    def add(self, prompt, repeat, max_tokens, ignore_eos):
        """Sometimes what an earlier request and its answer were, and more: a second turn."""
        self.next_id += 1
        if repeat and self.texts:
            prompt = (self.texts[self.next_id % len(self.texts)] + prompt)[:40]
        sequence = Sequence(
            seq_id=self.next_id,
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
            seed=0,
            max_tokens=max_tokens or 10_000,
            arrival_time=self.now,
        )
        if self.scheduler.add(sequence) is None:
            self.live[self.next_id] = sequence
        return self.next_id

    @rule()
    def make_plan(self):
        if self.plan is not None:
            return
        self.could_decode = {s.seq_id for s in self.scheduler._states.decoding}
        self.plan = self.scheduler.plan(self.now)
        assert (self.plan is not None) == bool(self.live)
        if self.plan is None:
            return
        self.ranks.execute(self.plan)
        if any(seq_id in self.live for seq_id in self.plan.released):
            event("preempted")
        if self.sliced:
            self.check_turns()
        elif self.chunk_tokens is None:
            assert bool(self.plan.prefills) != bool(self.plan.decodes)
            assert all(item.samples for item in self.plan.prefills)
        else:
            num_new = sum(item.num_new_tokens for item in self.plan.prefills)
            assert num_new + len(self.plan.decodes) <= max(
                self.chunk_tokens, len(self.plan.decodes)
            )
            if self.plan.prefills and self.plan.decodes:
                event("hybrid")
        if not self.sharing and not self.sliced:
            running = {s.seq_id for s in self.scheduler._states.running.values()}
            waiting = self.live.keys() - running
            assert not waiting or max(running) < min(waiting), "first come, first served"
        for item in self.plan.prefills:
            sequence = self.live[item.seq_id]
            assert item.token_ids == sequence.prompt_token_ids + sequence.output_token_ids
            if item.num_shared_tokens:
                event("shared")
            if self.sharing and self.spans_of is not None:
                own = self.spans_of(item.num_prompt_tokens)
                assert 2 * item.spans[0] >= own[0], "cells less than half as large"
        for item in self.plan.decodes:
            sequence = self.live[item.seq_id]
            cached = self.ranks.tokens[item.seq_id]
            assert cached == sequence.prompt_token_ids + sequence.output_token_ids

    def check_turns(self):
        """Between two slices of prefills whoever can decodes."""
        self.waited = 0 if self.plan.decodes else self.waited + 1
        if self.could_decode & self.scheduler._states.running.keys():
            assert self.waited <= 1, "decodes waited for two slices"
        if self.plan.layers is not None:
            event("slice")
        assert all(item.samples for item in self.plan.prefills), "a pass takes whole prompts"
        if self.plan.layers is not None and self.plan.layers.chunked:
            event("chunk" if self.plan.layers.end_token else "chunk up to a layer's end")
        if self.plan.dropped:
            event("dropped")
        if len(self.ranks.passes) > 1:
            event("overtaken")

    @rule(data=st.data())
    def commit(self, data):
        if self.plan is not None:
            num_items = len(self.plan.sampled)
            token = st.one_of(st.integers(0, VOCAB - 1), st.integers(0, VOCAB - 1), st.none())
            tokens = st.lists(token, min_size=num_items, max_size=num_items)
            self.commit_tokens(data.draw(tokens))

    def commit_tokens(self, tokens):
        plan, self.plan = self.plan, None
        self.now += 0.004 * max(1, len(plan.prefills))
        for seq_id, token in zip(plan.sampled, tokens, strict=True):
            if token is None:
                self.ranks.fail(plan, seq_id)
        output = StepOutput(tokens, [None] * len(tokens))
        for sequence in self.scheduler.commit(plan, output, self.now):
            assert len(sequence.token_times) == len(sequence.output_token_ids)
            if sequence.finish_reason is FinishReason.ERROR:
                assert tokens[plan.sampled.index(sequence.seq_id)] is None
            else:
                assert sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
                self.texts.append(sequence.prompt_token_ids + sequence.output_token_ids)
            del self.live[sequence.seq_id]

    @rule(num_steps=st.integers(1, 12), token_id=st.integers(EOS, EOS + 1))
    def run(self, num_steps, token_id):
        for _ in range(num_steps):
            self.make_plan()
            if self.plan is not None:
                self.commit_tokens([token_id] * len(self.plan.sampled))

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
        try:
            self.run_to_the_end()
        finally:
            prompt_placement.LEAST_CHUNK = USUAL_CHUNK

    def run_to_the_end(self):
        for _ in range(20_000):
            self.make_plan()
            if self.plan is None:
                break
            self.commit_tokens([5] * len(self.plan.sampled))
        assert not self.live and self.scheduler.kv_usage == 0.0


TestSchedulerHistories = SchedulerHistories.TestCase
TestSchedulerHistories.settings = settings(
    max_examples=250,
    stateful_step_count=60,
    deadline=None,  # the machine may be busy
    suppress_health_check=[HealthCheck.too_slow],
)
