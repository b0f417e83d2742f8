"""One comparison as plain values: its setting, and the outcome of each system at each rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sps2_mega.config import CSAConfig
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.figures import Limits
from sps2_mega.simulator.line_up import Place
from sps2_mega.simulator.system import System


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Workload, cluster and systems; `arrivals` at rate 1, `arguments` for the record."""

    name: str
    place: Place
    arrivals: tuple[Arrival, ...]
    rates: tuple[float, ...]
    families: tuple[str, ...]
    ablations: tuple[str, ...]
    tune_on: int
    limits: Limits
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Figures of one system at one rate; `wall_s` is the simulation's own time in seconds."""

    system: System
    rate: float
    figures: Mapping[str, Any]
    wall_s: float

    def as_json(self) -> dict[str, object]:
        return {
            "system": dataclasses.asdict(self.system),
            "rate": self.rate,
            "wall_s": round(self.wall_s, 2),
            "figures": rounded(self.figures),
        }

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Outcome:
        """Inverse of `as_json`."""
        values = _with_tuples(entry["system"])
        csa = _with_tuples(values.pop("csa"))
        return Outcome(
            system=System(**values, csa=CSAConfig(**csa)),
            rate=entry["rate"],
            figures=entry["figures"],
            wall_s=entry["wall_s"],
        )


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def rounded(value: Any) -> Any:
    """The value with all floats in it at five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    return value


def layout_of(system: System) -> str:
    """Layout of a system in a few characters, for tables."""
    text = f"{system.replicas} x tp{system.tp}" + (f" sp{system.sp}" if system.sp > 1 else "")
    if system.dcp > 1:
        text += f" dcp{system.dcp}"
    if system.decode_replicas:
        text += f" + {system.decode_replicas} x tp{system.decode_tp}"
    if system.policy == "sarathi":
        text += f", chunks of {system.chunk_tokens}"
    if system.tbt_target_ms is not None:
        text += f", {system.tbt_target_ms:g} ms between tokens"
    return text
