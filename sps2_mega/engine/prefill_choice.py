"""How prefill attends in this job: transport and sparse pattern, from configuration, model and ranks.

`auto` on several SP ranks stays `auto` for exact attention: `PrefillPlanner` then decides step by step.
"""

from __future__ import annotations

from sps2_mega.attention.spans import SparsePrefill, local_kv_heads
from sps2_mega.config import CSAConfig, EngineConfig, ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.kv_cache.placement import Layout
from sps2_mega.parallel.topology import Topology


def choose_transport(transport: str, csa: CSAConfig, model: ModelConfig, *, sp: int = 1) -> str:
    """Resolve `auto` where nothing is left to decide per step.

    Raises:
        ConfigError: CSA is asked for where it cannot be had.
    """
    if csa.exact:
        return "ulysses" if transport == "auto" and sp == 1 else transport
    if transport not in ("auto", "gather"):
        raise ConfigError(
            f"csa degrees {csa.degrees} move keys: use transport gather or auto, not {transport}"
        )
    if model.sliding_window is not None:
        raise ConfigError(
            f"csa degrees {csa.degrees} cannot be combined with the model's sliding window "
            f"of {model.sliding_window} tokens"
        )
    return "gather"


def prompt_layout(transport: str, csa: CSAConfig) -> Layout:
    """How a prompt is spread over SP ranks. Zigzag balances causal work where every rank has its own queries;
    a sparse prompt's work is mostly its own cell, and its cells should not be torn apart. `auto` cannot know
    yet: zigzag costs ulysses a reordering of rows, contiguous would cost the others up to half of their speed."""
    balanced = transport in ("gather", "ring", "pass_q", "auto")
    return "zigzag" if balanced and csa.exact else "contiguous"


def sparse_prefill(
    config: EngineConfig, model: ModelConfig, topology: Topology, *, tp_rank: int
) -> SparsePrefill | None:
    """What sparse prefill needs, or None for exact attention.

    Raises:
        ConfigError: degrees, spans and SP levels do not fit.
    """
    if config.csa.exact:
        return None
    sparse = SparsePrefill(
        csa=config.csa,
        sp_levels=topology.sp_levels,
        kv_heads=local_kv_heads(model.num_kv_heads, tp_rank=tp_rank, tp=topology.tp),
        block_size=config.cache.block_size,
    )
    sparse.pattern(1)  # a pattern of any length shows whether the numbers fit
    return sparse
