"""A decode pool's scheduler, its sequences and steps, in tests."""

from __future__ import annotations

from sps2_mega.config import SchedulerConfig
from sps2_mega.scheduler.admission import Limits
from sps2_mega.scheduler.decode_scheduler import DecodeScheduler
from sps2_mega.types import SamplingParams, Sequence, StepOutput

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
