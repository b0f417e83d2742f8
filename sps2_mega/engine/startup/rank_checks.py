"""Checks of a rank before it meets the others: everything that can be refused without them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sps2_mega.attention.planner.attention_choice import choose_transport
from sps2_mega.checkpoint.resolve import ResolvedModel, resolve_model
from sps2_mega.checkpoint.sharding import check_tp
from sps2_mega.config import EngineConfig, ModelConfig
from sps2_mega.engine.startup.attention_setup import check_pipeline
from sps2_mega.errors import ConfigError
from sps2_mega.mcore.init import Compute, choose_compute
from sps2_mega.parallel.launcher import LaunchInfo
from sps2_mega.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRank:
    """Resolved settings of this rank; `config` has what the model's file suggests filled in;
    `tokenizer` is read on rank 0 of the job."""

    config: EngineConfig
    resolved: ResolvedModel
    compute: Compute
    transport: str
    max_model_len: int
    tokenizer: Tokenizer | None


def check_rank(config: EngineConfig, info: LaunchInfo) -> CheckedRank:
    """Resolve model, transport, context length and device, and set the number of CPU threads.

    Raises:
        ConfigError, CheckpointError: a setting cannot work on this rank.
    """
    if dist.is_initialized():
        raise ConfigError(
            "this process has a torch.distributed process group already, and can have one only: "
            "close the other LLM, or destroy the group, before this one is made"
        )
    resolved = resolve_model(
        config.model,
        tokenizer=config.tokenizer,
        config=config.config,
        needs_weights=config.load_format != "dummy",
    )
    config = config.replace(csa=config.csa.over(resolved.csa))
    check_tp(resolved.config, config.parallel.tp)
    check_pipeline(config, info.rank)
    transport = choose_transport(
        config.transport, config.csa, resolved.config, sp=config.parallel.sp
    )
    max_model_len = resolve_max_model_len(config.max_model_len, resolved.config)
    compute = choose_compute(config.device, config.dtype, resolved.config.dtype, info.local_rank)
    if compute.device.type == "cpu":
        torch.set_num_threads(config.threads or _threads_per_rank(info))
    # Before the ranks meet, since the others learn of a problem there; only rank 0 has texts.
    folder = resolved.tokenizer if info.rank == 0 else None
    tokenizer = None if folder is None else Tokenizer.load(folder)
    return CheckedRank(
        config=config,
        resolved=resolved,
        compute=compute,
        transport=transport,
        max_model_len=max_model_len,
        tokenizer=tokenizer,
    )


def resolve_max_model_len(given: int | None, model: ModelConfig) -> int:
    """Longest prompt plus output, in tokens.

    Raises:
        ConfigError: learned positions end earlier.
    """
    if given is None:
        return model.max_position_embeddings
    if given < 1:
        raise ConfigError(f"max_model_len must be at least 1, got {given}")
    if given > model.max_position_embeddings:
        if model.rope is None:
            raise ConfigError(
                f"max_model_len={given} exceeds the model's {model.max_position_embeddings} "
                "learned positions"
            )
        log.warning(
            "max_model_len=%d exceeds the model's trained context of %d tokens: quality is not "
            "assured",
            given,
            model.max_position_embeddings,
        )
    return given


def _threads_per_rank(info: LaunchInfo) -> int:
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // info.local_world_size)
