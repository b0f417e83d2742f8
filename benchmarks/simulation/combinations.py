"""Combinations of model, hardware and trace for `benchmarks/plan_sweep.py`.

Nothing was tuned on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One combination; `rate` and `length` multiply those of the trace, limits are in seconds."""

    model: str
    hardware: str
    nodes: int
    trace: str
    rate: float
    length: float = 1.0
    link: str | None = None
    ttft_s: float = 5.0
    tbt_s: float = 0.1
    requests: int = 40

    @property
    def name(self) -> str:
        over = f" over {self.link}" if self.link else ""
        longer = f" x {self.length:g}" if self.length != 1 else ""
        gpus = f"{self.nodes} x 8 {self.hardware}{over}"
        return f"{self.model}, {gpus}, {self.trace}{longer} at {self.rate:g}"


def _c(model: str, hardware: str, nodes: int, trace: str, rate: float, **more: Any) -> Combination:
    return Combination(model=model, hardware=hardware, nodes=nodes, trace=trace, rate=rate, **more)


COMBINATIONS = (
    _c("llama-3-8b", "h100", 1, "mooncake", 1.0),
    _c("llama-3-8b", "h100", 1, "azure-code", 4.0),
    _c("llama-3-8b", "h200", 2, "mooncake-synthetic", 2.0),
    _c("llama-3-8b", "a100-80g", 1, "azure-conversation", 2.0),
    _c("llama-3-8b", "a100-80g", 2, "mooncake", 2.0, link="rdma-100g"),
    _c("llama-3-8b", "b200", 1, "servegen", 2.0),
    _c("mistral-7b", "a100-80g", 1, "mooncake-synthetic", 0.5),
    _c("mistral-7b", "h100", 2, "azure-code", 2.0, length=4.0),
    _c("mistral-7b", "h200", 1, "azure-conversation", 4.0),
    _c("mistral-7b", "h100", 2, "mooncake", 4.0, link="ethernet-25g"),
    _c("qwen3-8b", "h100", 1, "mooncake-synthetic", 1.0, length=2.0),
    _c("qwen3-8b", "h200", 1, "servegen", 1.0),
    _c("yi-34b", "h100", 1, "mooncake", 0.5),
    _c("yi-34b", "h200", 2, "azure-code", 1.0, length=8.0, ttft_s=10.0),
    _c("yi-34b", "a100-80g", 2, "azure-conversation", 1.0),
    _c("yi-34b", "b200", 1, "mooncake-synthetic", 0.5, ttft_s=10.0),
    _c("llama-3.1-70b", "h100", 2, "mooncake", 0.5, ttft_s=10.0),
    _c("llama-3.1-70b", "h200", 1, "azure-code", 1.0),
    _c("llama-3.1-70b", "h200", 2, "mooncake-synthetic", 0.25, ttft_s=10.0),
    _c("llama-3.1-70b", "b200", 2, "azure-code", 1.0, length=4.0, link="rdma-100g"),
)
