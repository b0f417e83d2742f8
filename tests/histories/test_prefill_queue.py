"""Interrupted prefills: order, overtaking, length of slices, and ends in between."""

import random

import pytest

from sps2_mega.config import SchedulerConfig
from sps2_mega.errors import Refusal
from sps2_mega.scheduler.layer_flops import LayerFlops
from sps2_mega.scheduler.prefill_queue import MAX_GROUPS
from sps2_mega.scheduler.scheduler import Scheduler
from sps2_mega.types import FinishReason, SamplingParams, Sequence, StepOutput

LAYERS = 8
WORK = LayerFlops(num_layers=LAYERS, token_flops=1000, pair_flops=1)
SECONDS_PER_FLOP = 1e-8  # a layer of 1000 tokens takes 15 ms
DECODE_S = 0.01


class Machine:
    """A scheduler and the seconds that its steps take."""

    def __init__(
        self, *, num_blocks=4096, sp_size=2, crowd_threshold=0, prefix_root=None, **config
    ):
        self.scheduler = Scheduler(
            SchedulerConfig(**{"tbt_target_ms": 100.0} | config),
            block_size=16,
            num_blocks=num_blocks,
            sp_size=sp_size,
            max_model_len=200_000,
            vocab_size=100,
            layer_flops=WORK,
            crowd_threshold=crowd_threshold,
            prefix_root=prefix_root,
        )
        self.now, self.next_id = 0.0, 0
        self.plans, self.passes = [], {}

    def add(self, prompt_len, max_tokens=1, prompt=None):
        sequence = Sequence(
            seq_id=self.next_id,
            prompt_token_ids=prompt or [self.next_id % 100] * prompt_len,
            params=SamplingParams(max_tokens=max_tokens),
            seed=0,
            max_tokens=max_tokens,
            arrival_time=self.now,
        )
        self.next_id += 1
        assert self.scheduler.add(sequence) is None
        return sequence

    def seconds(self, plan):
        if not plan.prefills and plan.layers is None:
            return DECODE_S
        items, layers = plan.prefills, LAYERS
        if plan.layers is not None:
            items = self.passes.setdefault(plan.layers.pass_id, items)
            layers = plan.layers.end - plan.layers.first
            if plan.layers.chunked:
                chunks = plan.layers.chunks(items[0].start, items[0].end)
                return sum(WORK.flops(a, b) for _, a, b in chunks) * SECONDS_PER_FLOP
        flops = sum(WORK.flops(item.start, item.end) for item in items)
        return layers * flops * SECONDS_PER_FLOP

    def step(self):
        plan = self.scheduler.plan(self.now)
        self.plans.append(plan)
        self.now += self.seconds(plan)
        count = len(plan.sampled)
        self.scheduler.commit(plan, StepOutput([2] * count, [None] * count), self.now)
        self.scheduler.check_integrity()
        return plan

    def run(self):
        while self.scheduler.has_work:
            self.step()
        assert self.scheduler.plan(self.now) is None  # idle: all blocks are back

    def warm_up(self):
        """One prompt of each size, so that step times are known."""
        for length in (16, 64, 256, 1000, 4000):
            self.add(length)
            self.run()
        self.plans.clear()


def gaps(sequence):
    return [b - a for a, b in zip(sequence.token_times, sequence.token_times[1:], strict=False)]


@pytest.mark.parametrize("prompt_len", [1000, 3999, 20_000])
def test_running_requests_keep_the_target_while_a_long_prompt_is_prefilled(prompt_len):
    machine = Machine()
    machine.warm_up()
    decoding = machine.add(10, max_tokens=400)
    for _ in range(20):
        machine.step()
    machine.add(prompt_len, max_tokens=5)
    machine.run()
    assert max(gaps(decoding)) < 0.125, "a size class is known to a factor of two only at first"
    assert sorted(gaps(decoding))[-5] < 0.102
    slices = [plan for plan in machine.plans if plan.layers is not None]
    assert slices
    most = max(plan.layers.end - plan.layers.first for plan in slices)
    assert most > 1 or prompt_len > 1000, "more than one layer where more fit"


def test_without_a_target_prompts_go_whole():
    machine = Machine(tbt_target_ms=None)
    decoding = machine.add(10, max_tokens=100)
    machine.step()
    machine.add(20_000)
    machine.run()
    assert max(gaps(decoding)) > 10
    assert all(plan.layers is None for plan in machine.plans)


def test_a_prompt_that_is_too_long_for_one_layer_goes_through_each_in_chunks_on_all_ranks():
    machine = Machine(sp_size=4)
    machine.warm_up()
    machine.add(20_001, max_tokens=5)
    chunks = []
    while machine.scheduler.has_work:
        plan = machine.step()
        if plan.prefills:
            (item,) = plan.prefills
            assert (item.start, item.end) == (0, 20_001)
        if plan.layers is not None:
            chunks += plan.layers.chunks(0, 20_001)
    expected = (0, 0)
    for layer, start, end in chunks:
        assert (layer, start) == expected, "every token once in every layer, layer after layer"
        blocks = item.block_ranks[start // 16 : -(-end // 16)]
        share = [blocks.count(rank) for rank in range(4)]
        if end < 20_001:
            assert max(share) == min(share), "every chunk is on all ranks alike"
        expected = (layer, end) if end < 20_001 else (layer + 1, 0)
    assert expected == (LAYERS, 0)
    lengths = [end - start for layer, start, end in chunks if layer == LAYERS - 1]
    assert len(lengths) > 5 and lengths[1] > 1.5 * lengths[-2], "chunks see more and grow shorter"


def test_a_short_prompt_overtakes_a_long_one_between_its_slices():
    machine = Machine()
    machine.warm_up()
    long = machine.add(20_000)
    for _ in range(5):
        machine.step()
    short = machine.add(100)
    machine.run()
    assert short.token_times[0] - short.arrival_time < 0.3
    assert long.token_times[0] > short.token_times[0]


def test_overtake_0_is_first_come_first_served():
    machine = Machine(overtake=0.0)
    machine.warm_up()
    long = machine.add(20_000)
    machine.step()
    short = machine.add(100)
    machine.run()
    assert short.token_times[0] > long.token_times[0]


@pytest.mark.parametrize("overtake", [0.5, 4.0])
def test_a_long_prompt_is_not_starved_by_a_stream_of_short_ones(overtake):
    """Short ones arrive as fast as they are served: without a bound the long one would starve."""
    machine = Machine(overtake=overtake)
    machine.warm_up()
    long = machine.add(6000)
    own_s = machine.scheduler._step_times.prompt_s(0, 6000)
    overtaking = []
    while not long.token_times:
        if machine.scheduler.num_waiting < 3:
            overtaking.append(machine.add(500))
        machine.step()
        assert machine.now < 100 * own_s, "starved"
    before = [s for s in overtaking if s.token_times and s.token_times[0] < long.token_times[0]]
    assert before, "nobody overtook"
    # What arrived later than that was served only in slices that were planned already.
    bound = long.arrival_time + overtake * own_s * 1.05
    assert sum(s.arrival_time > bound for s in before) <= 3


def test_no_more_than_a_few_groups_are_on_their_way():
    machine = Machine(max_prefill_tokens=100, overtake=100.0)
    machine.warm_up()
    suspended = set()
    for length in (20_000, 8000, 4000, 2000, 1000, 500):
        machine.add(length)
        plan = machine.step()
        if plan.layers is not None:
            suspended.add(plan.layers.pass_id)
    assert len(suspended) == MAX_GROUPS
    machine.run()


def test_an_abort_between_slices_keeps_the_blocks_until_the_last_slice():
    machine = Machine(max_prefill_tokens=4000)
    first, second = machine.add(200), machine.add(300)
    plan = machine.step()  # nothing is known yet: the least chunk of a prompt, in one layer
    machine.run()
    machine.warm_up()
    first, second = machine.add(1500), machine.add(1600)
    plan = machine.step()
    assert [item.seq_id for item in plan.prefills] == [first.seq_id, second.seq_id]
    assert plan.layers is not None and plan.sampled == []
    used = machine.scheduler.kv_usage
    assert machine.scheduler.abort(first.seq_id)
    assert machine.scheduler.kv_usage == used, "later slices write there"
    assert machine.scheduler.add(first) is Refusal.DUPLICATE_ID
    while not second.token_times:
        plan = machine.step()
        assert plan.released == [] and plan.dropped == []
    assert plan.sampled == [first.seq_id, second.seq_id]
    assert second.finish_reason is FinishReason.LENGTH and first.output_token_ids == []
    assert machine.scheduler.kv_usage == 0.0
    machine.add(5)
    plan = machine.step()
    assert sorted(plan.released) == [first.seq_id, second.seq_id]


def test_a_group_without_members_is_dropped_at_once():
    machine = Machine()
    machine.warm_up()
    long = machine.add(3000)
    plan = machine.step()
    pass_id = plan.layers.pass_id
    assert machine.scheduler.abort(long.seq_id)
    assert machine.scheduler.kv_usage == 0.0 and not machine.scheduler.has_work
    assert machine.scheduler.plan(machine.now) is None
    machine.add(5)
    plan = machine.step()
    assert plan.dropped == [pass_id] and plan.released == [long.seq_id]


def test_a_decode_that_needs_blocks_takes_them_from_the_youngest_prefill():
    machine = Machine(num_blocks=100, sp_size=1)
    old = machine.add(200, max_tokens=500)
    while not old.token_times:
        machine.step()
    young = machine.add(1350)
    while young.scheduled_time is None:
        machine.step()
    machine.run()
    assert len(old.token_times) == 500 and old.num_preemptions == 0
    assert len(young.token_times) == 1


def test_random_traffic_ends_and_decodes_wait_for_one_slice_at_most():
    numbers = random.Random(3)
    machine = Machine(num_blocks=150, max_running=9, sp_threshold=200)
    sequences = []
    for _ in range(150):
        if numbers.random() < 0.4:
            length = numbers.choice((1, 3, 50, 300, 900, 2500))
            sequences.append(machine.add(length, max_tokens=numbers.randrange(1, 40)))
        alive = [s for s in sequences if s.finish_reason is None]
        if alive and numbers.random() < 0.1:
            assert machine.scheduler.abort(numbers.choice(alive).seq_id)
        if machine.scheduler.has_work:
            machine.step()
    machine.run()
    for sequence in sequences:
        aborted = sequence.finish_reason is FinishReason.ABORT
        assert aborted or len(sequence.output_token_ids) == sequence.max_tokens


def test_short_prompts_lie_on_one_rank_each_and_long_ones_on_all():
    machine = Machine(sp_size=4, sp_threshold=100, overtake=0.0)
    lengths = (50, 99, 99, 20, 100, 1)
    machine.add(16)
    machine.run()
    machine.scheduler._step_times.computed(10**6, 1e-3)  # so that all fit into one group
    for length in lengths:
        machine.add(length)
    ranks = [set(item.block_ranks) for item in machine.step().prefills]
    assert [len(found) for found in ranks] == [1, 1, 1, 1, 4, 1]
    assert set().union(*ranks[:4]) == {0, 1, 2, 3}, "one rank each"


@pytest.mark.parametrize(
    ("lengths", "whole"),
    [
        ((60, 60), [True, True]),
        ((90,), [False]),  # alone: only below the threshold
        ((90, 90), [True, True]),
        ((90, 200), [True, False]),  # more than a rank's share, and too long anyway
        ((70, 30, 10), [False, True, True]),
        ((140, 140, 140, 140), [False] * 4),
    ],
)
def test_where_there_is_one_for_each_rank_longer_prompts_lie_whole_too(lengths, whole):
    machine = Machine(sp_threshold=65, crowd_threshold=130, overtake=0.0, tbt_target_ms=None)
    for length in lengths:
        machine.add(length)
    ranks = [set(item.block_ranks) for item in machine.step().prefills]
    assert [len(found) == 1 for found in ranks] == whole


def test_a_short_prompt_waits_for_a_long_one_only_if_it_shares_most_of_it():
    machine = Machine(prefix_root=b"settings")
    machine.warm_up()
    text = [i % 97 for i in range(12_000)]
    long = machine.add(0, prompt=text)
    machine.step()
    system = machine.add(0, prompt=text[:64] + [98] * 40)
    again = machine.add(0, prompt=[*text[:11_000], 98])
    machine.run()
    assert system.token_times[0] < long.token_times[0] < again.token_times[0]
    assert system.num_cached_tokens == 0 and again.num_cached_tokens == 10_992
