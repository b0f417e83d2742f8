"""Systems that are compared on a number of GPUs, and the settings tried for each.

    sarathi        tensor parallel, chunked prompts in hybrid batches (Sarathi-Serve, arXiv
                   2403.02310)
    sarathi-large  sarathi with the largest chunks: sooner first tokens, later others
    sarathi-wide   sarathi with one engine over all GPUs
    whole-prompts  tensor parallel, prompts whole and before decodes
    vllm-dcp       sarathi with tensor parallelism beyond the KV heads, whose copies share the cache
    ring           dense context parallelism, keys and values in a ring (arXiv 2411.01783)
    ulysses        dense, heads by all-to-all (arXiv 2309.14509)
    sps2           exact SP prefill by the planner's transport, queries move in decode
    sps2-yield     sps2 whose prefill gives way to decodes between layers, to keep a target
    sps2-csa       sps2 with sparse attention
    sps2-split     sps2-csa with engines of their own for decode

Every family gets all its layouts, and several sizes of chunks where it has chunks, so that none is
compared at a bad setting; `tuned` takes the one with the least mean response time on a part of the
workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.model_size import model_size
from sps2_mega.simulator.simulator import simulate
from sps2_mega.simulator.system import System

CHUNKS = (512, 2048, 8192)
TBT_TARGET_MS = 100.0  # the server's default
FAMILIES = (
    "sarathi",
    "sarathi-large",
    "sarathi-wide",
    "whole-prompts",
    "vllm-dcp",
    "ring",
    "ulysses",
    "sps2",
    "sps2-yield",
    "sps2-csa",
    "sps2-split",
)
# Part that is taken away -> the family that loses it, at its tuned setting.
ABLATIONS = {
    "no-csa": "sps2-split",
    "no-pipeline": "sps2-split",
    "no-separate-decode": "sps2-split",
    "no-elastic": "sps2-split",
    "no-sp-decode": "sps2-csa",  # split systems decode by TP
}
_WEIGHT_SHARE = 0.7  # of a GPU's memory that weights may take: a cache must be left


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One model on `gpus` GPUs; `far_degree` is CSA's degree beyond the own rank."""

    model: ModelConfig
    hardware: Hardware
    gpus: int
    far_degree: int = 4
    prefix_caching: bool = False

    @property
    def min_tp(self) -> int:
        """The least power of two at which weights leave room for a cache.

        Raises:
            ConfigError: not even all GPUs together hold the weights.
        """
        weights = model_size(self.model).weight_bytes
        tp = 1
        while weights / tp > _WEIGHT_SHARE * self.hardware.memory_bytes:
            tp *= 2
            if tp > self.gpus:
                raise ConfigError(
                    f"{weights / 1e9:.0f} GB of weights need more than {self.gpus} GPUs of "
                    f"{self.hardware.memory_bytes / 1e9:.0f} GB"
                )
        return tp

    def csa(self, tp: int, sp: int) -> CSAConfig:
        """CSA, dense on the own rank and with one key in `far_degree` on every other level."""
        levels = len(self.hardware.sp_machine(tp, sp).sp_levels)
        return CSAConfig(degrees=(1, *[self.far_degree] * levels))


def candidates(family: str, place: Place) -> list[System]:
    """All settings of a family that fit the GPUs; none where it makes no sense there.

    Raises:
        ConfigError: no such family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"{family!r} is not one of {', '.join(FAMILIES)}")
    node, gpus = place.hardware.gpus_per_node, place.gpus
    degrees = [tp for tp in (1, 2, 4, 8, 16, 32, 64) if place.min_tp <= tp <= gpus]
    inside = [tp for tp in degrees if tp <= node] or degrees[:1]
    caching = place.prefix_caching
    chunked = [
        System(name=family, policy="sarathi", chunk_tokens=chunk, prefix_caching=caching)
        for chunk in CHUNKS
    ]
    if family in ("sarathi", "sarathi-large"):
        sizes = chunked[-1:] if family == "sarathi-large" else chunked
        return [s.replace(tp=tp, replicas=gpus // tp) for s in sizes for tp in inside]
    if family == "sarathi-wide":
        return [s.replace(tp=gpus) for s in chunked] if gpus > max(inside) else []
    if family == "vllm-dcp":
        heads = place.model.num_kv_heads
        beyond = [tp for tp in degrees if tp > heads and gpus % tp == 0]
        return [
            s.replace(tp=tp, dcp=tp // heads, replicas=gpus // tp)
            for s in chunked
            for tp in beyond[:1]
        ]
    if family == "whole-prompts":
        return [
            System(name=family, tp=tp, replicas=gpus // tp, prefix_caching=caching) for tp in inside
        ]
    if family == "sps2-split":
        return _split(place, inside)
    return _together(family, place, inside)


def tuned(systems: Sequence[System], place: Place, part: Sequence[Arrival]) -> System:
    """The system with the least mean response time on a part of the workload, refusals last.

    Raises:
        ConfigError: there is nothing to choose from.
    """
    if not systems:
        raise ConfigError("no setting of this family fits the GPUs")
    if len(systems) == 1:
        return systems[0]

    def key(system: System) -> tuple[int, float]:
        run = simulate(part, system, place.model, place.hardware)
        served = [timing.total_s for timing in run.timings]
        return run.refused, sum(served) / max(1, len(served))

    return min(systems, key=key)


def ablated(system: System, ablation: str, place: Place) -> System:
    """`system` (of the family that `ABLATIONS` names) without one of its parts.

    Raises:
        ConfigError: no such ablation.
    """
    name = f"{system.name} {ablation}"
    changes: dict[str, dict[str, object]] = {
        "no-csa": {"csa": CSAConfig()},
        "no-pipeline": {"pipelined": False},
        "no-sp-decode": {"decode_move": "keys"},
        "no-elastic": {"elastic": False},
    }
    if ablation in changes:
        return system.replace(name=name, **changes[ablation])
    if ablation != "no-separate-decode":
        raise ConfigError(f"{ablation!r} is not one of {', '.join(ABLATIONS)}")
    if not system.decode_replicas:
        return system.replace(name=name)
    sp = system.num_gpus // system.tp
    csa = system.csa if system.csa.exact else place.csa(system.tp, sp)  # as many levels as now
    return system.replace(name=name, sp=sp, csa=csa, decode_replicas=0, decode_tp=1, decode_sp=1)


def _together(family: str, place: Place, inside: Sequence[int]) -> list[System]:
    """Systems with SP over all GPUs, or over equal shares of them in several engines."""
    transports = {"ring": ("ring",), "ulysses": ("ulysses",)}
    found = []
    for tp in inside:
        for replicas in (1, 2, 4):
            sp = place.gpus // tp // replicas
            if sp < 2:
                continue
            system = System(
                name=family, tp=tp, sp=sp, replicas=replicas, prefix_caching=place.prefix_caching
            )
            if family in transports:
                system = system.replace(transports=transports[family], elastic=False)
            elif family == "sps2-csa":
                system = system.replace(csa=place.csa(tp, sp))
            elif family == "sps2-yield":
                system = system.replace(tbt_target_ms=TBT_TARGET_MS)
            found.append(system)
    return found


def _split(place: Place, inside: Sequence[int]) -> list[System]:
    """Systems in which half or three quarters of the GPUs prefill together, the others decode."""
    found = []
    for share in (2, 4):
        decode_gpus = place.gpus // share
        for tp in inside:
            sp, left = divmod(place.gpus - decode_gpus, tp)
            if left or sp < 2 or not _fits(place, tp, sp):
                continue
            for decode_tp in inside:
                if decode_gpus % decode_tp:
                    continue
                found.append(
                    System(
                        name="sps2-split",
                        tp=tp,
                        sp=sp,
                        csa=place.csa(tp, sp),
                        decode_tp=decode_tp,
                        decode_replicas=decode_gpus // decode_tp,
                    )
                )
    return found


def _fits(place: Place, tp: int, sp: int) -> bool:
    """Whether SP fills whole nodes."""
    try:
        place.hardware.sp_machine(tp, sp)
    except ConfigError:
        return False
    return True
