"""Policy of the scheduler: order, admission, preemption, ends, and the cost of planning a step."""

import time

import pytest

from sps2_mega.config import SchedulerConfig
from sps2_mega.errors import Refusal
from sps2_mega.scheduler.scheduler import Scheduler
from sps2_mega.types import FinishReason, ForwardMode, SamplingParams, Sequence, StepOutput

EOS = 7


def scheduler_of(
    *, num_blocks=64, sp_size=2, block_size=4, max_model_len=512, layout="contiguous", **config
):
    return Scheduler(
        SchedulerConfig(**config),
        block_size=block_size,
        num_blocks=num_blocks,
        sp_size=sp_size,
        max_model_len=max_model_len,
        vocab_size=100,
        eos_token_ids=(EOS,),
        layout=layout,
    )


def sequence_of(seq_id, prompt_len=5, max_tokens=8, **params):
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=[10 + i % 50 for i in range(prompt_len)],
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=seq_id,
        max_tokens=max_tokens if max_tokens is not None else 10_000,
        arrival_time=0.0,
    )


def step(scheduler, tokens=None, now=1.0):
    """Plan and commit one step; token 20 + step number for everybody unless given."""
    plan = scheduler.plan(now)
    items = plan.prefills or plan.decodes
    tokens = tokens or [20 + plan.step % 70] * len(items)
    finished = scheduler.commit(plan, StepOutput(tokens, [None] * len(tokens)), now)
    return plan, finished


def ids(items):
    return [item.seq_id for item in items]


def test_prefill_comes_first_then_all_decode_with_positions_and_new_blocks():
    scheduler = scheduler_of(num_blocks=8)
    sequence = sequence_of(1, prompt_len=7)
    assert scheduler.add(sequence) is None
    assert scheduler.has_work and scheduler.num_waiting == 1
    plan, _ = step(scheduler, [30], now=2.5)
    (item,) = plan.prefills
    assert plan.mode is ForwardMode.PREFILL and plan.decodes == []
    assert item.token_ids == sequence.prompt_token_ids and item.num_prompt_tokens == 7
    assert item.block_ranks == [0, 1] and item.block_ids == [0, 0]
    assert (sequence.scheduled_time, sequence.token_times) == (2.5, [2.5])
    plan, _ = step(scheduler, [31])
    (decode,) = plan.decodes
    assert plan.mode is ForwardMode.DECODE and plan.prefills == []
    assert (decode.token_id, decode.position, decode.new_block) == (30, 7, None)
    scheduler.add(sequence_of(2))
    plan, _ = step(scheduler, [40])
    assert ids(plan.prefills) == [2], "a newcomer goes before the next decode"
    plan, _ = step(scheduler, [32, 41])
    assert [(d.seq_id, d.token_id, d.position) for d in plan.decodes] == [(1, 31, 8), (2, 40, 5)]
    assert plan.decodes[0].new_block is not None and plan.decodes[1].new_block is None
    assert plan.step == 4


def test_zigzag_layout_reaches_the_plan():
    scheduler = scheduler_of(layout="zigzag")
    scheduler.add(sequence_of(1, prompt_len=32))
    assert scheduler.plan(0.0).prefills[0].block_ranks == [0, 0, 1, 1, 1, 1, 0, 0]


def test_prefill_batches_are_bounded_but_a_long_prompt_still_goes_alone():
    scheduler = scheduler_of(max_prefill_tokens=20)
    for seq_id, prompt_len in enumerate([33, 12, 8, 1]):
        scheduler.add(sequence_of(seq_id, prompt_len))
    assert ids(step(scheduler)[0].prefills) == [0]
    assert ids(step(scheduler)[0].prefills) == [1, 2]
    assert ids(step(scheduler)[0].prefills) == [3]


def test_newcomers_leave_a_free_block_for_each_running_sequence():
    scheduler = scheduler_of(num_blocks=2, sp_size=2)
    scheduler.add(sequence_of(0, prompt_len=8, max_tokens=2))
    scheduler.add(sequence_of(1, prompt_len=8, max_tokens=2))
    assert ids(step(scheduler)[0].prefills) == [0]
    assert ids(step(scheduler)[0].decodes) == [0]
    assert ids(step(scheduler)[0].prefills) == [1], "alone it may take all blocks"


def test_max_running_holds_newcomers_back():
    scheduler = scheduler_of(max_running=2)
    for seq_id in range(3):
        scheduler.add(sequence_of(seq_id, max_tokens=2))
    assert ids(step(scheduler)[0].prefills) == [0, 1]
    plan, finished = step(scheduler)
    assert ids(plan.decodes) == [0, 1] and [s.seq_id for s in finished] == [0, 1]
    plan, _ = step(scheduler)
    assert ids(plan.prefills) == [2] and plan.released == [0, 1]


def test_nobody_overtakes_a_long_prompt_that_waits_for_blocks():
    scheduler = scheduler_of(num_blocks=4, sp_size=2)
    scheduler.add(sequence_of(0, prompt_len=20, max_tokens=3))
    scheduler.add(sequence_of(1, prompt_len=24, max_tokens=3))
    scheduler.add(sequence_of(2, prompt_len=1, max_tokens=3))
    assert ids(step(scheduler)[0].prefills) == [0]
    assert ids(step(scheduler)[0].decodes) == [0]
    assert ids(step(scheduler)[0].decodes) == [0]
    assert ids(step(scheduler)[0].prefills) == [1, 2]


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        (sequence_of(1, prompt_len=0), Refusal.EMPTY_PROMPT),
        (sequence_of(1, prompt_len=40), Refusal.PROMPT_TOO_LONG),
        (sequence_of(1, prompt_len=39, max_tokens=50), None),
        (sequence_of(1, prompt_len=20, max_tokens=6), Refusal.EXCEEDS_KV_CACHE),
        (sequence_of(1, prompt_len=20, max_tokens=5), None),
        (sequence_of(1, prompt_len=24, max_tokens=None), None),
        (sequence_of(1, prompt_len=25, max_tokens=None), Refusal.EXCEEDS_KV_CACHE),
    ],
)
def test_refusals_are_values(sequence, expected):
    # 6 blocks of 4 tokens, so 24 cached tokens; the last token of a sequence is not cached.
    num_blocks = 10 if len(sequence.prompt_token_ids) >= 39 else 3
    scheduler = scheduler_of(num_blocks=num_blocks, max_model_len=40)
    assert scheduler.add(sequence) is expected
    assert scheduler.has_work is (expected is None)


@pytest.mark.parametrize("token_id", [-1, 100])
def test_tokens_outside_the_vocabulary_are_refused(token_id):
    sequence = sequence_of(1)
    sequence.prompt_token_ids[2] = token_id
    assert scheduler_of().add(sequence) is Refusal.TOKEN_OUT_OF_RANGE


def test_full_queue_and_duplicate_ids_are_refused():
    scheduler = scheduler_of(max_waiting=1)
    assert scheduler.add(sequence_of(1)) is None
    assert scheduler.add(sequence_of(1)) is Refusal.DUPLICATE_ID
    assert scheduler.add(sequence_of(2)) is Refusal.QUEUE_FULL
    step(scheduler)
    assert scheduler.add(sequence_of(1)) is Refusal.DUPLICATE_ID
    assert scheduler.add(sequence_of(2)) is None


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "num_tokens"),
    [
        ({}, [20, EOS, 21], FinishReason.STOP, 2),
        ({"ignore_eos": True}, [20, EOS, 21, 22, 23], FinishReason.LENGTH, 4),
        ({"stop_token_ids": (33,)}, [20, 33, 21], FinishReason.STOP, 2),
        ({"stop_token_ids": (33,), "ignore_eos": True}, [EOS, 33, 21], FinishReason.STOP, 2),
        ({"min_tokens": 3}, [EOS, EOS, EOS, 21], FinishReason.STOP, 3),
        ({}, [20, 21, 22, EOS], FinishReason.STOP, 4),
    ],
)
def test_endings_and_the_last_token_belongs_to_the_output(params, tokens, reason, num_tokens):
    scheduler = scheduler_of()
    sequence = sequence_of(1, max_tokens=4, **params)
    scheduler.add(sequence)
    for token in tokens[:num_tokens]:
        assert sequence.finish_reason is None
        _, finished = step(scheduler, [token])
    assert finished == [sequence]
    assert sequence.finish_reason is reason
    assert sequence.output_token_ids == tokens[:num_tokens]
    assert not scheduler.has_work and scheduler.plan(9.0) is None


def test_model_length_and_cache_size_end_a_sequence_without_max_tokens():
    for num_blocks, max_model_len, expected_len in [(64, 12, 12), (2, 500, 17)]:
        scheduler = scheduler_of(num_blocks=num_blocks, max_model_len=max_model_len)
        assert scheduler.limits.max_len == expected_len
        sequence = sequence_of(1, prompt_len=5, max_tokens=None)
        scheduler.add(sequence)
        while scheduler.has_work:
            step(scheduler)
        assert sequence.num_tokens == expected_len
        assert sequence.finish_reason is FinishReason.LENGTH


def test_youngest_is_preempted_and_comes_back_with_all_its_tokens():
    # 6 blocks of 4 tokens in all; three sequences of 4+9 tokens need 3 blocks each in the end.
    scheduler = scheduler_of(num_blocks=3, block_size=4)
    sequences = [sequence_of(i, prompt_len=4, max_tokens=9) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    preempted = []
    while scheduler.has_work:
        before = {s.seq_id: list(s.output_token_ids) for s in sequences}
        plan, _ = step(scheduler)
        scheduler.check_integrity()
        preempted += [i for i in plan.released if sequences[i].finish_reason is None]
        for item in plan.prefills:
            assert item.token_ids == sequences[item.seq_id].prompt_token_ids + before[item.seq_id]
            assert item.num_prompt_tokens == 4
    assert preempted and 0 not in preempted, "the oldest is never preempted"
    assert sum(s.num_preemptions for s in sequences) == len(preempted)
    assert all(len(s.output_token_ids) == 9 for s in sequences)
    assert [s.seq_id for s in sequences if s.num_preemptions] == [2]


def test_abort_in_every_state_frees_everything():
    scheduler = scheduler_of(max_running=1)
    waiting, running = sequence_of(1), sequence_of(0)
    scheduler.add(running)
    scheduler.add(waiting)
    plan = scheduler.plan(0.0)
    assert scheduler.abort(0), "between plan and commit"
    assert scheduler.commit(plan, StepOutput([50], [None]), 1.0) == []
    assert running.output_token_ids == [] and running.finish_reason is FinishReason.ABORT
    assert scheduler.abort(1) and not scheduler.abort(1) and not scheduler.abort(99)
    assert waiting.finish_reason is FinishReason.ABORT
    assert scheduler.kv_usage == 0.0 and scheduler.plan(2.0) is None
    scheduler.add(sequence_of(3))
    assert scheduler.plan(3.0).released == [0], (
        "told with the next plan; 1 was never sent to the ranks"
    )


def test_an_id_may_be_reused_right_after_an_abort():
    scheduler = scheduler_of()
    scheduler.add(sequence_of(1))
    plan = scheduler.plan(0.0)
    scheduler.abort(1)
    again = sequence_of(1, prompt_len=3)
    assert scheduler.add(again) is None
    scheduler.commit(plan, StepOutput([50], [None]), 1.0)
    assert again.output_token_ids == []
    plan, _ = step(scheduler)
    assert plan.released == [1] and ids(plan.prefills) == [1]


def test_engine_can_finish_a_sequence_by_a_stop_string():
    scheduler = scheduler_of()
    sequence = sequence_of(1)
    scheduler.add(sequence)
    step(scheduler)
    assert scheduler.finish(1, FinishReason.STOP)
    assert sequence.finish_reason is FinishReason.STOP and scheduler.plan(0.0) is None


def test_plans_and_commits_must_alternate():
    scheduler = scheduler_of()
    scheduler.add(sequence_of(1))
    plan = scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="before the last plan was committed"):
        scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="1 sequences were planned, the output has 2"):
        scheduler.commit(plan, StepOutput([1, 2], [None, None]), 0.0)


def test_decode_spreads_last_blocks_over_ranks():
    scheduler = scheduler_of(num_blocks=64, sp_size=4)
    for seq_id in range(8):
        scheduler.add(sequence_of(seq_id, prompt_len=16, max_tokens=40))
    step(scheduler)
    plan, _ = step(scheduler)
    ranks = [item.new_block[0] for item in plan.decodes]
    assert sorted(ranks) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_planning_and_committing_sixteen_decodes_is_cheap():
    scheduler = scheduler_of(num_blocks=4096, block_size=16, max_model_len=8192)
    for seq_id in range(16):
        scheduler.add(sequence_of(seq_id, prompt_len=100, max_tokens=2000))
    step(scheduler)
    best = float("inf")
    for _ in range(300):
        start = time.perf_counter()
        plan = scheduler.plan(0.0)
        planned = time.perf_counter()
        scheduler.commit(plan, StepOutput([20] * 16, [None] * 16), 0.0)
        best = min(best, planned - start)
    assert best < 0.15e-3, f"{best * 1e3:.3f} ms"
