"""Every default, once: frozen dataclasses for parallel layout, cache, scheduler and engine.

A field declared with `flag` is a command-line flag; one declared with `unflagged` is set by
`--override`. `sps2_mega.cli` builds its parsers from these declarations.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sps2_mega.config_fields import flag, unflagged
from sps2_mega.errors import ConfigError
from sps2_mega.model_config import ModelConfig, RopeConfig

__all__ = [
    "DTYPES",
    "CSAConfig",
    "CacheConfig",
    "EngineConfig",
    "ModelConfig",
    "ParallelConfig",
    "RopeConfig",
    "SchedulerConfig",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Parallel degrees; the world size is tp * sp + `decode_ranks`.

    With `decode_ranks`, decode has ranks of its own, and `tp` and `sp` are the shape of the ranks
    that prefill. `sp_levels` are ring sizes, innermost first; None: taken from the node topology.
    """

    tp: int = flag(1, "tensor-parallel degree", also=("--tensor-parallel-size", "-tp"))
    sp: int = flag(1, "sequence-parallel degree")
    sp_levels: tuple[int, ...] | None = flag(
        None, "sizes of the SP levels, innermost first, e.g. 4,2 (default: from the node topology)"
    )
    decode_ranks: int = flag(
        0, "ranks beyond tp * sp, the last ones of the job, that decode (0: all ranks do both)"
    )
    decode_tp: int | None = unflagged(
        None, "tensor-parallel degree of the decode ranks, the rest is SP (default: --tp)"
    )

    weights: Literal["auto", "owner", "sliced"] = unflagged(
        "auto",
        "owner: an SP rank computes the feed-forward and output layers of its own rows; sliced: SP "
        "ranks share the reading of those weights; auto: the faster one of each step, as measured",
    )

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.tp * self.sp + self.decode_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """KV cache. `num_blocks` is per SP rank; None: as many as `memory_fraction` of the memory
    that is free after loading weights holds."""

    block_size: int = unflagged(16, "tokens per KV cache block")
    num_blocks: int | None = flag(
        None,
        "KV cache blocks per SP rank (default: from free memory)",
        name="num-gpu-blocks-override",
    )
    memory_fraction: float = flag(
        0.85,
        "share of the device memory that is free after loading weights for KV cache and "
        "activations; on CPU, of the rank's part of the free host memory",
        name="gpu-memory-utilization",
    )
    no_prefix_caching: bool = flag(
        False, "do not share the KV blocks of common prefixes", name="no-enable-prefix-caching"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Order and size of steps.

    `policy` sps2: prompts go before decodes and, with `tbt_target_ms`, give way to them between
    layers. sarathi: every step decodes all running sequences and fills up with chunks of prompts
    to `chunk_tokens` (arXiv 2403.02310).
    """

    policy: Literal["sps2", "sarathi"] = flag(
        "sps2",
        "sps2: whole prompts go before decodes; sarathi: chunks of prompts ride along with decodes",
        name="scheduler",
    )
    chunk_tokens: int = unflagged(512, "tokens of a step under sarathi, decodes included")
    tbt_target_ms: float | None = flag(
        None,
        "prefill gives way so that running requests get a token about this often, in ms; 0: it "
        "is never interrupted (default: 0, and 100 in the server)",
    )
    overtake: float = unflagged(
        4.0,
        "with --tbt-target-ms, a prompt is overtaken only by prompts that arrive within X times "
        "its own prefill time; 0: first come, first served",
    )
    sp_threshold: int | None = flag(
        None,
        "prompts below this many tokens lie whole on one SP rank each, side by side; 0: never "
        "(default: from the machine)",
    )
    max_running: int = flag(64, "sequences decoded together at most", name="max-num-seqs")
    max_prefill_tokens: int = flag(
        8192,
        "prompt tokens batched into one prefill step (a longer prompt goes alone)",
        name="max-num-batched-tokens",
    )
    max_waiting: int | None = flag(
        None,
        "length of the waiting queue (default: no limit, and 256 in the server)",
        name="max-num-queued-reqs",
    )

    def __post_init__(self) -> None:
        if self.policy not in ("sps2", "sarathi"):
            raise ConfigError(f"scheduler must be sps2 or sarathi, got {self.policy!r}")
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")
        for name in ("tbt_target_ms", "overtake", "sp_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number >= 0, got {value}")
        if self.tbt_target_ms and self.policy == "sarathi":
            raise ConfigError(
                f"tbt_target_ms={self.tbt_target_ms:g} needs scheduler sps2: under sarathi, "
                "chunk_tokens sets the pace"
            )

    @property
    def tbt_target_s(self) -> float | None:
        """The target in seconds; None where prefill is never interrupted."""
        return self.tbt_target_ms / 1e3 if self.tbt_target_ms else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CSAConfig:
    """Communication-efficient sparse attention in prefill; all degrees 1 is exact attention.

    `degrees=None`: as the model's file in model_configs/ says, else exact. `spans=None`: cells
    follow ranks and nodes, as in the paper; they are then resolved per request.
    """

    degrees: tuple[int, ...] | None = flag(
        None,
        "CSA degree of each level, nearest first: a head sees 1 key in d (default: the model "
        "file's, else 1: exact)",
        name="csa-degrees",
    )
    spans: tuple[int, ...] | None = unflagged(
        None, "tokens of one cell of each CSA level but the last (default: from ranks and nodes)"
    )
    sinks: int = unflagged(16, "first tokens that every query sees")
    halo: int = unflagged(128, "keys before its own cell that a query always sees")
    tail: int = unflagged(128, "last tokens of a prompt that see all keys")
    sample_queries: bool = unflagged(
        False, "stride queries too, as the paper does: cheaper, less accurate"
    )
    block: int = unflagged(1, "neighbouring far keys that are kept or dropped together")

    @property
    def level_degrees(self) -> tuple[int, ...]:
        """The degrees; (1,), exact, where none were given."""
        return (1,) if self.degrees is None else self.degrees

    @property
    def exact(self) -> bool:
        return all(degree == 1 for degree in self.level_degrees)

    def over(self, suggested: CSAConfig | None) -> CSAConfig:
        """This pattern with its own degrees, else the suggested one with what is set here."""
        if self.degrees is not None or suggested is None:
            return self.replace(degrees=self.level_degrees)
        default = CSAConfig()
        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        }
        return suggested.replace(degrees=suggested.level_degrees).replace(**given)

    def replace(self, **changes: Any) -> CSAConfig:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to start; `model` is a folder or a name in model_configs/."""

    model: str = flag(
        "sps2-tiny", "Hugging Face folder, Megatron checkpoint folder, or a name in model_configs/"
    )
    config: str | None = flag(
        None,
        "architecture in place of the model's own: a name in model_configs/ or a file, YAML as "
        "there or a Hugging Face config.json",
    )
    tokenizer: str | None = flag(None, "tokenizer folder (default: the model's own)")
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    csa: CSAConfig = field(default_factory=CSAConfig)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "weights and activations (auto: the checkpoint's on CUDA, float32 on CPU)"
    )
    load_format: Literal["auto", "dummy"] = flag(
        "auto", "dummy: random weights, to measure without a checkpoint"
    )
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto takes CUDA where there is one")
    transport: str = flag(
        "auto",
        "how prefill moves data between SP ranks: ulysses, gather, ring, pass_q, or one for each "
        "SP level, nearest first, as gather,ulysses (auto: planned step by step)",
    )
    pipeline: Literal["auto", "on", "off"] = flag(
        "auto", "prefill computes while data travels (auto: where prompts are long enough to gain)"
    )
    micro_batches: int | None = unflagged(
        None, "parts of a layer's prefill attention (default: from prompt and model)"
    )
    decode_attention: Literal["dense", "csa"] = flag(
        "dense", "what generated tokens see: all keys, or with csa degrees what the pattern shows"
    )
    cuda_graphs: Literal["auto", "off"] = flag(
        "off", "auto: decode steps of one CUDA rank are captured and replayed"
    )
    max_model_len: int | None = flag(None, "longest prompt plus output (default: the model's)")
    threads: int | None = flag(
        None, "CPU threads per rank (default: the node's cores shared by its ranks)"
    )
    trace: str | None = flag(
        None, "file for a Perfetto trace of prefill steps, all ranks (default: no trace)"
    )
    seed: int = flag(0, "seed of requests that have none of their own")
    step_timeout: float = unflagged(600.0, "seconds after which an unfinished step fails the job")

    def replace(self, **changes: Any) -> EngineConfig:
        return dataclasses.replace(self, **changes)
