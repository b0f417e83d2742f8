"""A rank of the runtime with random weights, and the plans that it is measured with.

Sequences enter decode without a prefill, over blocks of random keys and values: the time of a step
does not depend on what they hold, and filling a million tokens by prefill would take longer than
all measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from benchmarks.gpu.part import Part
from sps2_mega.config import CacheConfig, EngineConfig, SchedulerConfig
from sps2_mega.engine.startup.start_rank import StartedRank, start_rank
from sps2_mega.mcore.init import finalize
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.types import DecodeItem, ForwardMode, PrefillItem, SamplingParams, StepPlan
from sps2_mega.worker.executor import Executor

_GREEDY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def config_of(
    part: Part, *, num_blocks: int | None, max_model_len: int, graphs: bool = False
) -> EngineConfig:
    """EngineConfig of a part; with `graphs` decode steps are captured, on a GPU."""
    return EngineConfig(
        model=part.sizes.model,
        load_format="dummy",
        dtype=part.sizes.dtype,  # type: ignore[arg-type]
        device=part.device.type,  # type: ignore[arg-type]
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_running=128),
        cuda_graphs="auto" if graphs else "off",
        max_model_len=max_model_len,
    )


@contextmanager
def started(config: EngineConfig) -> Iterator[StartedRank]:
    rank = start_rank(config, from_environment(), show_progress=False)
    try:
        yield rank
    finally:
        rank.watchdog.close()
        finalize()


def prompt_plan(rank: StartedRank, seq_id: int, tokens: int) -> StepPlan:
    """Plan that prefills one prompt of random tokens into the cache's first blocks.

    It also ends the sequence before.
    """
    generator = np.random.default_rng(seq_id)
    vocabulary = rank.resolved.config.vocab_size
    token_ids = generator.integers(0, vocabulary, tokens).tolist()
    item = _item(rank, seq_id, token_ids, first_block=0)
    released = [seq_id - 1] if seq_id else []
    return StepPlan(seq_id, ForwardMode.PREFILL, [item], [], released)


class RunningSequences:
    """Sequences that decode on one rank, all in one batch.

    Sequence i starts with `contexts[i]` tokens in the cache, which must have room for
    `num_blocks(contexts, steps, block_size)` blocks. `executor` is the rank's, or another one on
    its weights and cache.
    """

    def __init__(self, rank: StartedRank, executor: Executor, contexts: Sequence[int]) -> None:
        self._executor, self._contexts, self._step = executor, list(contexts), 0
        size = executor.pool.block_size
        first = 0
        for seq_id, context in enumerate(contexts):
            executor.enter(_item(rank, seq_id, [1] * context, first_block=first))
            first += -(-context // size)
        # Blocks opened while decoding follow those of the contexts.
        self._next_block = first
        self._token_ids = [1] * len(self._contexts)

    def step(self) -> None:
        """Run one decode step of all sequences, until the tokens are on the host."""
        size = self._executor.pool.block_size
        items = []
        for seq_id, context in enumerate(self._contexts):
            position, new_block = context + self._step, None
            if position % size == 0:
                new_block = (0, self._next_block)
                self._next_block += 1
            items.append(DecodeItem(seq_id, self._token_ids[seq_id], position, new_block))
        self._step += 1
        plan = StepPlan(self._step, ForwardMode.DECODE, [], items, [])
        output = self._executor.execute(plan)
        assert None not in output.token_ids, "random weights gave no finite logits"
        self._token_ids = [token for token in output.token_ids if token is not None]

    def leave(self) -> None:
        self._executor.forget(range(len(self._contexts)))


def num_blocks(contexts: Sequence[int], steps: int, block_size: int) -> int:
    """Blocks that `RunningSequences` takes, those opened while decoding included."""
    return sum(-(-(context + steps) // block_size) for context in contexts)


def fill_cache(rank: StartedRank, layers: int) -> None:
    """Write random keys and values into every block."""
    for layer in range(layers):
        for cache in rank.executor.pool.layer(layer):
            with torch.inference_mode():
                cache.normal_()


def _item(rank: StartedRank, seq_id: int, token_ids: list[int], *, first_block: int) -> PrefillItem:
    blocks = -(-len(token_ids) // rank.executor.pool.block_size)
    return PrefillItem(
        seq_id=seq_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        block_ranks=[0] * blocks,
        block_ids=list(range(first_block, first_block + blocks)),
        params=_GREEDY,
        seed=0,
        start=0,
        end=len(token_ids),
    )
