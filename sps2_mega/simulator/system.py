"""Settings of one simulated serving system on a number of GPUs.

`line_up` says which settings stand for which published system.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from sps2_mega.config import CSAConfig
from sps2_mega.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """`replicas` engines of tp * sp GPUs each; requests go to the engine with the least work.

    With `decode_replicas` > 0, that many further engines of `decode_tp` * `decode_sp` GPUs decode
    what the others have prefilled (disaggregated). `decode_move` names what travels in SP decode:
    queries, or keys and values. `dcp` TP ranks that would hold the same KV head share its tokens
    instead (decode context parallelism). `chunk_tokens` belongs to policy sarathi. Under
    `tbt_target_ms` prefill gives way to decodes between layers. `elastic` allows local prefill:
    short prompts whole on one SP rank each.

    Raises:
        ConfigError: a degree is below 1, or settings exclude each other.
    """

    name: str
    policy: Literal["sps2", "sarathi"] = "sps2"
    tp: int = 1
    sp: int = 1
    replicas: int = 1
    transports: tuple[str, ...] = ("ulysses", "gather", "ring", "pass_q")
    csa: CSAConfig = field(default_factory=CSAConfig)
    pipelined: bool = True
    elastic: bool = True
    chunk_tokens: int = 2048
    max_prefill_tokens: int = 8192
    tbt_target_ms: float | None = None
    max_running: int = 256
    dcp: int = 1
    decode_move: Literal["queries", "keys"] = "queries"
    decode_replicas: int = 0
    decode_tp: int = 1
    decode_sp: int = 1
    prefix_caching: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "sp", "replicas", "dcp", "decode_tp", "decode_sp", "max_running"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"system {self.name}: {name} must be >= 1, got {getattr(self, name)}"
                )
        if self.decode_replicas < 0:
            raise ConfigError(f"system {self.name}: decode_replicas must not be negative")
        if self.policy == "sarathi" and not self.csa.exact:
            raise ConfigError(
                f"system {self.name}: the simulator prices CSA for whole prompts only"
            )
        if self.prefix_caching and self.decode_replicas:
            raise ConfigError(f"system {self.name}: prefix caching is priced for colocated engines")

    @property
    def num_gpus(self) -> int:
        return self.replicas * self.tp * self.sp + (
            self.decode_replicas * self.decode_tp * self.decode_sp
        )

    def replace(self, **changes: Any) -> System:
        return dataclasses.replace(self, **changes)
