"""Measured speeds of the machine: the links of each SP level, and attention on one rank.

Plain numbers that all ranks agree on; `comm.probe` and `engine.startup.machine_probe` measure them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

PROBED_TOKENS = (2, 128)  # per rank
_FASTEST_CPU_FLOPS_PER_S = 1e13


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One SP level: seconds of a small message, and bytes per second of a rank while all send.

    Between CPUs each byte that a rank sends while it receives another one takes `core_s_per_byte`
    of its cores; 0 where that was not measured.
    """

    latency_s: float
    bytes_per_s: float
    core_s_per_byte: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Links and speeds of a job's SP ranks.

    `links[l]` joins the groups of `sp_levels[l]` ranks; attention does `flops_per_s` on each rank
    (a multiply and an add are two). Beside that, each call of it takes `call_s`, merging two
    partials `merge_s` for each number of the output, and gathering rows `copy_s` for each number. A
    small all-gather among all SP ranks takes `gather_s`; None: a latency for each of them.

    All speeds hold while all ranks compute, `ranks_per_core` of them on each core; a rank that
    computes alone is as many times faster.

    Between CPUs, where it was measured, `layer_s` has the seconds of a layer of each of
    `PROBED_TOKENS` per rank beside its bytes and FLOPs, by exact transport, and `work_s` the
    seconds of an SP level of a sparse layer with next to nothing to compute, by transport; both
    then stand for latencies and calls.
    """

    sp_levels: tuple[int, ...]
    links: tuple[Link, ...]
    flops_per_s: float
    call_s: float = 0.0
    merge_s: float = 0.0
    copy_s: float = 0.0
    gather_s: float | None = None
    ranks_per_core: float = 1.0
    layer_s: dict[str, tuple[float, ...]] = field(default_factory=dict)
    work_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.links) == len(self.sp_levels), (
            f"{len(self.sp_levels)} SP levels need as many links, got {len(self.links)}"
        )

    @property
    def on_cpu(self) -> bool:
        """Whether ranks are CPUs, judged by their speed."""
        return self.flops_per_s < _FASTEST_CPU_FLOPS_PER_S

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Machine:
        """Read what `to_json` wrote; ValueError for any other text."""
        try:
            values = json.loads(text)
            return Machine(
                sp_levels=tuple(values["sp_levels"]),
                links=tuple(Link(**link) for link in values["links"]),
                flops_per_s=float(values["flops_per_s"]),
                call_s=float(values["call_s"]),
                merge_s=float(values["merge_s"]),
                copy_s=float(values["copy_s"]),
                gather_s=None if values["gather_s"] is None else float(values["gather_s"]),
                ranks_per_core=float(values["ranks_per_core"]),
                layer_s={str(name): tuple(map(float, s)) for name, s in values["layer_s"].items()},
                work_s={str(name): float(s) for name, s in values["work_s"].items()},
            )
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ValueError(f"not a measured machine: {error!r}") from error
