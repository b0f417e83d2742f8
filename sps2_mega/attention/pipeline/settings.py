"""Settings of the pipeline of a job, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sps2_mega.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    """Pipeline of a job: `mode` as configured; `micro_batches` overrides the automatic number."""

    mode: Literal["auto", "on", "off"] = "auto"
    micro_batches: int | None = None

    def __post_init__(self) -> None:
        if self.micro_batches is not None and self.micro_batches < 1:
            raise ConfigError(f"micro_batches must be at least 1, got {self.micro_batches}")
        if self.mode == "off" and self.micro_batches not in (None, 1):
            raise ConfigError(
                f"pipeline off has 1 micro-batch, but micro_batches={self.micro_batches} was given"
            )


PIPELINE_OFF = PipelineSettings(mode="off")
