"""Random histories of conversations that share prefixes, and what a plan costs among them."""

import random
import time

import pytest
from scheduled_ranks import Ranks

from sps2_mega.types import FinishReason, StepOutput
from tests.unit.scheduler.shared_prefixes import BLOCK, scheduler_of, sequence_of, step, text


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chunk_tokens", [None, 7, 33])
def test_long_histories_of_conversations(seed, chunk_tokens):
    """Turns of a few conversations under a cache that holds about two of them."""
    rng = random.Random(seed)
    sp_size, num_blocks = rng.choice([(1, 40), (3, 14), (4, 9)])
    policy = {} if chunk_tokens is None else dict(policy="sarathi", chunk_tokens=chunk_tokens)
    scheduler = scheduler_of(num_blocks=num_blocks, sp_size=sp_size, max_running=5, **policy)
    ranks = Ranks(BLOCK, num_blocks, sp_size)
    talks = [text(rng.randrange(1, 30), talk // 2) for talk in range(8)]
    live, next_id, preempted, found = {}, 0, 0, 0
    for _ in range(600):
        if len(live) < 7 and rng.random() < 0.4:
            talk = rng.randrange(len(talks))
            if len(talks[talk]) > 80:
                talks[talk] = text(rng.randrange(1, 30), talk // 2)
            talks[talk] = talks[talk] + text(rng.randrange(1, 6), next_id)
            sequence = sequence_of(next_id, list(talks[talk]), max_tokens=rng.randrange(1, 30))
            assert scheduler.add(sequence) is None
            live[next_id] = (talk, sequence)
            next_id += 1
        if not scheduler.has_work:
            continue
        failing = [i for i in live if rng.random() < 0.003]
        if rng.random() < 0.01 and live:
            scheduler.abort(rng.choice(list(live)))
        if scheduler.has_work:
            step(scheduler, ranks, failing)
        for seq_id, (talk, sequence) in list(live.items()):
            if sequence.finish_reason is not None:
                del live[seq_id]
                preempted += sequence.num_preemptions
                found += sequence.num_cached_tokens
                if sequence.finish_reason is FinishReason.LENGTH:
                    talks[talk] = sequence.prompt_token_ids + sequence.output_token_ids
    assert found > 500 and preempted >= 3


def test_a_long_prompt_is_hashed_once_and_plans_stay_cheap():
    scheduler = scheduler_of(num_blocks=80_000, sp_size=1)
    prompt = [i % 97 for i in range(2000)]
    for seq_id in range(64):
        scheduler.add(sequence_of(seq_id, [seq_id, *prompt], max_tokens=90))
    while scheduler.num_waiting:
        step_quietly(scheduler)
    best = float("inf")
    for _ in range(40):
        began = time.perf_counter()
        plan = scheduler.plan(0.0)
        best = min(best, time.perf_counter() - began)
        scheduler.commit(plan, StepOutput([9] * 64, [None] * 64), 0.0)
    assert best < 0.3e-3, f"{best * 1e3:.3f} ms"


def step_quietly(scheduler):
    plan = scheduler.plan(0.0)
    count = len(plan.sampled)
    scheduler.commit(plan, StepOutput([9] * count, [None] * count), 0.0)
