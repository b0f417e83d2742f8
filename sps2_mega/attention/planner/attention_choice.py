"""Transport and sparse pattern of a job's prefill, from configuration, model and ranks. Pure ints.

`auto` on several SP ranks stays `auto`: `step_planner.PrefillPlanner` then chooses step by step.
`attention.build` makes attention of either.
"""

from __future__ import annotations

from sps2_mega.attention.csa.spans import SparsePrefill, local_kv_heads
from sps2_mega.attention.levels.exchanges import LEVEL_TRANSPORTS, prefill_exchanges
from sps2_mega.config import CSAConfig, EngineConfig, ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.kv_cache.placement import Layout
from sps2_mega.parallel.topology import Topology


def choose_transport(transport: str, csa: CSAConfig, model: ModelConfig, *, sp: int = 1) -> str:
    """Check `transport`, and resolve `auto` where nothing is left to choose per step.

    Raises:
        ConfigError: no such transport, or the model's sliding window excludes CSA or transports by
            level.
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
    """Placement of a prompt's blocks on SP ranks.

    Zigzag balances causal work where every rank computes its own queries. A sparse prompt's work is
    mostly in each query's own cell, and cells should not be torn apart. Under `auto` the transport
    is not known yet: zigzag costs `ulysses` a reordering of rows, contiguous blocks would cost the
    others up to half of their speed.
    """
    balanced = transport in ("gather", "ring", "pass_q", "auto")
    return "zigzag" if balanced and csa.exact else "contiguous"


def sparse_prefill(
    config: EngineConfig, model: ModelConfig, topology: Topology, transport: str, *, tp_rank: int
) -> SparsePrefill | None:
    """Pattern and transports of CSA or of transports by level; None for exact attention by one.

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
    check_levels(sparse)
    return sparse


def check_levels(sparse: SparsePrefill) -> None:
    """Refuse settings that do not fit together.

    Raises:
        ConfigError: degrees or transports, spans and SP levels do not fit.
    """
    sparse.pattern(1)  # a pattern of any length shows whether the numbers fit
    if sparse.transports != ("auto",):
        prefill_exchanges(sparse.transports, sparse.sp_levels, num_heads=1, num_kv_heads=1)
