"""A scheduler that shares prefixes, its sequences and steps, in tests."""

import random

from sps2_mega.config import CSAConfig, SchedulerConfig
from sps2_mega.kv_cache.block_chain import chain_root
from sps2_mega.scheduler.scheduler import Scheduler
from sps2_mega.types import SamplingParams, Sequence, StepOutput

BLOCK = 4


def scheduler_of(*, num_blocks=64, sp_size=2, spans_of=None, **config):
    return Scheduler(
        SchedulerConfig(**config),
        block_size=BLOCK,
        num_blocks=num_blocks,
        sp_size=sp_size,
        max_model_len=4096,
        vocab_size=100,
        prefix_root=chain_root(CSAConfig()),
        topology_spans=spans_of,
    )


def sequence_of(seq_id, prompt, max_tokens=4):
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        max_tokens=max_tokens,
        arrival_time=0.0,
    )


def text(length, seed=0):
    return random.Random(seed).choices(range(100), k=length)


def step(scheduler, ranks=None, failing=()):
    plan = scheduler.plan(0.0)
    if ranks is not None:
        ranks.execute(plan)
    tokens = [None if i in failing else (7 * i + plan.step) % 100 for i in plan.sampled]
    for seq_id in failing:
        if ranks is not None and seq_id in plan.sampled:
            ranks.fail(plan, seq_id)
    scheduler.commit(plan, StepOutput(tokens, [None] * len(tokens)), 1.0)
    scheduler.check_integrity()
    return plan
