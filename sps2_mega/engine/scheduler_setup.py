"""The scheduler of a started job: what the configuration says, and what follows from model, cache and machine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from sps2_mega.attention.spans import SparsePrefill
from sps2_mega.config import SchedulerConfig
from sps2_mega.engine.layer_work import LayerWork
from sps2_mega.engine.prefill_choice import prompt_layout
from sps2_mega.engine.scheduler import Scheduler
from sps2_mega.engine.side_by_side import auto_threshold
from sps2_mega.engine.startup import StartedRank
from sps2_mega.kv_cache.block_chain import chain_root

log = logging.getLogger(__name__)


def make_scheduler(rank: StartedRank) -> Scheduler:
    """For the rank that drives the others."""
    config, model = rank.config, rank.resolved.config
    work = LayerWork.of(model)
    return Scheduler(
        _with_sp_threshold(rank, work),
        block_size=config.cache.block_size,
        num_blocks=rank.num_blocks,
        sp_size=rank.groups.sp.size,
        max_model_len=rank.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        layout=prompt_layout(rank.transport, config.csa),
        prefix_root=None if config.cache.no_prefix_caching else chain_root(config.csa),
        topology_spans=_topology_spans(rank.executor.prefill.sparse),
        work=work,
    )


def _with_sp_threshold(rank: StartedRank, work: LayerWork) -> SchedulerConfig:
    """With what the machine suggests where `--sp-threshold` is not given; 0 where a transport is forced or chunks are
    mixed with decodes."""
    scheduler = rank.config.scheduler
    if scheduler.policy == "sarathi":
        return scheduler
    planner, sp_size = rank.executor.prefill.planner, rank.groups.sp.size
    threshold = scheduler.sp_threshold
    if threshold is None and planner is not None and sp_size > 1:
        threshold = auto_threshold(
            planner,
            work,
            block_size=rank.config.cache.block_size,
            sp_size=sp_size,
            tp_size=rank.groups.tp.size,
        )
        log.info(
            "prompts below %d tokens are prefilled on one SP rank each, side by side", threshold
        )
    return dataclasses.replace(scheduler, sp_threshold=threshold or 0)


def _topology_spans(sparse: SparsePrefill | None) -> Callable[[int], tuple[int, ...]] | None:
    """The CSA spans of a prompt length, where they come from the ranks."""
    if sparse is None or sparse.csa.spans is not None:
        return None
    return lambda prompt_len: sparse.pattern(prompt_len).spans
