"""How prefill attends in this job: transport and sparse pattern, from configuration, model and
ranks.

`auto` on several SP ranks stays `auto`: `PrefillPlanner` then decides step by step.
"""

from __future__ import annotations

from sps2_mega.attention.csa.spans import SparsePrefill, local_kv_heads
from sps2_mega.attention.levels.exchanges import LEVEL_TRANSPORTS
from sps2_mega.config import CSAConfig, EngineConfig, ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.kv_cache.placement import Layout
from sps2_mega.parallel.topology import Topology


def choose_transport(transport: str, csa: CSAConfig, model: ModelConfig, *, sp: int = 1) -> str:
    """`transport` checked, and `auto` resolved where nothing is left to decide per step.

    Raises:
        ConfigError: there is no such transport, or CSA or transports by level are asked for where
            they cannot be had.
    """
    names = transport.split(",")
    unknown = [name for name in names if name not in LEVEL_TRANSPORTS]
    if unknown and transport != "auto":
        raise ConfigError(
            f"transport must be auto, or one of {', '.join(LEVEL_TRANSPORTS)} for all SP levels "
            "or for each, "
            f"got {transport!r}"
        )
    if (not csa.exact or len(names) > 1) and model.sliding_window is not None:
        asked = f"transports {transport}" if csa.exact else f"csa degrees {csa.level_degrees}"
        raise ConfigError(
            f"{asked} cannot be combined with the model's sliding window of "
            f"{model.sliding_window} tokens"
        )
    if transport != "auto" or sp > 1:
        return transport
    return "ulysses" if csa.exact else "gather"


def prompt_layout(transport: str, csa: CSAConfig) -> Layout:
    """How a prompt is spread over SP ranks. Zigzag balances causal work where every rank has its
    own queries; a sparse prompt's work is mostly its own cell, and its cells should not be torn
    apart. `auto` cannot know yet: zigzag costs ulysses a reordering of rows, contiguous would cost
    the others up to half of their speed."""
    balanced = transport in ("gather", "ring", "pass_q", "auto")
    return "zigzag" if balanced and csa.exact else "contiguous"


def sparse_prefill(
    config: EngineConfig, model: ModelConfig, topology: Topology, transport: str, *, tp_rank: int
) -> SparsePrefill | None:
    """What sparse prefill needs, or None for exact attention with one transport.

    Raises:
        ConfigError: degrees or transports, spans and SP levels do not fit.
    """
    transports = tuple(transport.split(","))
    if config.csa.exact and len(transports) == 1:
        return None
    sparse = SparsePrefill(
        csa=config.csa,
        sp_levels=topology.sp_levels,
        kv_heads=local_kv_heads(model.num_kv_heads, tp_rank=tp_rank, tp=topology.tp),
        block_size=config.cache.block_size,
        transports=transports,
    )
    sparse.check()
    return sparse
