"""Scheduler of a started job: its configuration, and what follows from model, cache and machine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.attention.planner.attention_choice import prompt_layout
from sps2_mega.engine.startup.sp_threshold import CROWD, auto_threshold
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.kv_cache.block_chain import chain_root
from sps2_mega.scheduler.layer_flops import LayerFlops
from sps2_mega.scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)


def make_scheduler(rank: StartedRank) -> Scheduler:
    """Scheduler for the rank that drives the others."""
    config, model = rank.config, rank.resolved.config
    layer_flops = LayerFlops.of(model)
    threshold, crowd_threshold = _sp_thresholds(rank, layer_flops)
    return Scheduler(
        dataclasses.replace(config.scheduler, sp_threshold=threshold),
        block_size=config.cache.block_size,
        num_blocks=rank.num_blocks,
        sp_size=rank.groups.sp.size,
        max_model_len=rank.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        layout=prompt_layout(rank.transport, config.csa),
        prefix_root=None if config.cache.no_prefix_caching else chain_root(config.csa),
        topology_spans=_topology_spans(rank.executor.prefill.sparse),
        layer_flops=layer_flops,
        crowd_threshold=crowd_threshold,
    )


def _sp_thresholds(rank: StartedRank, layer_flops: LayerFlops) -> tuple[int, int]:
    """Thresholds in tokens, of a prompt alone and of prompts that arrive together.

    As configured, else as the machine suggests. 0 where a transport is forced: the user then wants
    to see it used.
    """
    given, planner = rank.config.scheduler.sp_threshold, rank.executor.prefill.planner
    sp_size = rank.groups.sp.size
    if given is not None or planner is None or sp_size == 1:
        return given or 0, 0
    threshold = auto_threshold(
        planner,
        layer_flops,
        block_size=rank.config.cache.block_size,
        sp_size=sp_size,
        tp_size=rank.groups.tp.size,
    )
    log.info(
        "prompts below %d tokens are prefilled whole on one SP rank, several at a time below %d",
        threshold,
        CROWD * threshold,
    )
    return threshold, CROWD * threshold


def _topology_spans(sparse: SparsePrefill | None) -> Callable[[int], tuple[int, ...]] | None:
    """CSA spans as a function of prompt length, where they follow from the topology; else None."""
    if sparse is None or sparse.csa.spans is not None:
        return None
    return lambda prompt_len: sparse.pattern(prompt_len).spans
