"""The prefill side's scheduler: the job's own (`engine.scheduler`), of which only prefills are asked."""

from __future__ import annotations

import dataclasses

from sps2_mega.engine.layer_work import LayerWork
from sps2_mega.engine.prefill_choice import prompt_layout
from sps2_mega.engine.scheduler import Scheduler
from sps2_mega.engine.startup import StartedRank
from sps2_mega.kv_cache.block_chain import chain_root


def prefill_scheduler(rank: StartedRank, *, max_len: int) -> Scheduler:
    """`max_len` is the longest prompt plus output that both sides can hold, in tokens. What waits here has been admitted
    before, so there is no limit. With a target for the time between tokens prompts run in slices here too, where
    nobody decodes: so that short ones and aborts get in."""
    config, model = rank.config, rank.resolved.config
    sparse = rank.executor.prefill.sparse
    spans = None
    if sparse is not None and sparse.csa.spans is None:
        pattern = sparse.pattern
        spans = lambda prompt_len: pattern(prompt_len).spans  # noqa: E731
    return Scheduler(
        dataclasses.replace(config.scheduler, max_waiting=None),
        block_size=config.cache.block_size,
        num_blocks=rank.num_blocks,
        sp_size=rank.groups.sp.size,
        max_model_len=max_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        layout=prompt_layout(rank.transport, config.csa),
        prefix_root=None if config.cache.no_prefix_caching else chain_root(config.csa),
        topology_spans=spans,
        work=LayerWork.of(model),
    )
