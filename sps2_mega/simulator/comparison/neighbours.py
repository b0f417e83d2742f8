"""Neighbouring settings of a system, for a search, and all settings of a place, to check it.

A neighbour differs in one knob: chunk size, target between tokens, number of engines, GPUs that
decode, degree of TP where sequences decode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from sps2_mega.errors import ConfigError
from sps2_mega.simulator.line_up import Place
from sps2_mega.simulator.system import System

CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
TBT_TARGETS_MS = (25.0, 50.0, 100.0, 200.0)
REPLICAS = (1, 2, 4, 8)
DECODE_EIGHTHS = (1, 2, 4, 6)  # of the GPUs


def neighbours(system: System, place: Place) -> list[System]:
    """Settings that differ from `system` in one knob and fit the place, without itself."""
    found = []
    for other in _changed(system, place):
        if other.num_gpus <= place.gpus and _fits(other, place) and other != system:
            found.append(other)
    return found


def everything(start: Iterable[System], place: Place) -> list[System]:
    """`start`, its neighbours and theirs, each once."""
    found = {_key(system): system for system in start}
    for _ in range(2):
        for system in list(found.values()):
            for other in neighbours(system, place):
                found.setdefault(_key(other), other)
    return list(found.values())


def _changed(system: System, place: Place) -> Iterator[System]:
    if system.policy == "sarathi":
        yield from (system.replace(chunk_tokens=chunk) for chunk in CHUNKS)
    if system.tbt_target_ms is not None:
        yield from (system.replace(tbt_target_ms=target) for target in TBT_TARGETS_MS)
    if system.decode_replicas:
        yield from _split(system, place)
    elif system.sp > 1:
        for replicas in REPLICAS:
            sp = place.gpus // system.tp // replicas
            if sp > 1:
                yield _with_sp(system.replace(replicas=replicas), sp, place)


def _split(system: System, place: Place) -> Iterator[System]:
    """Other shares of the GPUs, and other TP where sequences decode."""
    for eighths in DECODE_EIGHTHS:
        decode_gpus = place.gpus * eighths // 8
        sp = (place.gpus - decode_gpus) // system.tp
        decode_replicas = decode_gpus // system.decode_tp
        if sp > 1 and decode_replicas:
            yield _with_sp(system.replace(decode_replicas=decode_replicas), sp, place)
    decode_gpus = system.decode_replicas * system.decode_tp
    for decode_tp in (1, 2, 4, 8):
        if place.min_tp <= decode_tp <= decode_gpus and decode_gpus % decode_tp == 0:
            yield system.replace(decode_tp=decode_tp, decode_replicas=decode_gpus // decode_tp)


def _with_sp(system: System, sp: int, place: Place) -> System:
    """The system at another SP degree, with the CSA degrees that its SP levels then need."""
    other = system.replace(sp=sp)
    if system.csa.exact or not _fits(other, place):
        return other
    return other.replace(csa=place.csa(system.tp, sp))


def _fits(system: System, place: Place) -> bool:
    """True if SP fills whole nodes."""
    try:
        place.hardware.sp_machine(system.tp, system.sp)
    except ConfigError:
        return False
    return True


def _key(system: System) -> str:
    return repr(dataclasses.astuple(system))
