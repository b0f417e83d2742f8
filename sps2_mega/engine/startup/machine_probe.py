"""Machine figures for the planner: measured once, then read from the user's cache directory.

Only rank 0 reads and writes the file; it broadcasts the figures, so all ranks plan with the same
ones. A file that cannot be read or written only means measuring again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from sps2_mega.attention.layout.causal_pairs import causal_pairs
from sps2_mega.comm.collectives import all_gather_rows, broadcast_bytes
from sps2_mega.comm.probe import agree_most, measure_gather, measure_links
from sps2_mega.engine.startup.transport_probe import LayerHeads, measure_layers
from sps2_mega.kernels.attention.sdpa import attend_run
from sps2_mega.kernels.lse.reference import merge_two
from sps2_mega.parallel.groups import Group, ParallelGroups
from sps2_mega.parallel.machine import Machine

log = logging.getLogger(__name__)

_MAX_AGE_S = 24 * 3600.0
_ROUNDS, _REPEATS = 3, 5
_FLOPS = {"cpu": 6e8, "cuda": 2e11}  # of the timed attention: takes milliseconds on both


def machine_facts(
    groups: ParallelGroups,
    heads: LayerHeads,
    *,
    device: torch.device,
    network: str,
    folder: Path,
) -> Machine:
    """Figures of the machine, the same on all ranks; all ranks call it together.

    Other hosts, another `network` (one of its addresses) or another shape of the job are measured
    anew; `folder` keeps the results.
    """
    hosts = _hosts(groups.control)
    place = f"{hosts} {network}"
    path = folder / f"machine-{_key(groups, heads, device, place)}.json"
    known = None
    if groups.global_rank == 0:
        known = _read(path)
    shared = broadcast_bytes(known.to_json().encode() if known else b"", groups.control)
    if shared:
        return Machine.from_json(shared.decode())
    began = time.monotonic()
    on_cpu = device.type == "cpu"
    speed = attention_speed(heads.head_dim, heads.dtype, device, groups.control)
    machine = Machine(
        sp_levels=tuple(level.size for level in groups.sp_levels),
        links=measure_links(groups.sp_levels, groups.control, device),
        gather_s=None if on_cpu else measure_gather(groups.sp, groups.control, device),
        ranks_per_core=_ranks_per_core(hosts, groups.control) if on_cpu else 1.0,
        flops_per_s=speed["flops_per_s"],
        call_s=speed["call_s"],
        merge_s=speed["merge_s"],
        copy_s=speed["copy_s"],
    )
    # On CUDA the host runs ahead of the device, which hides most of a short layer's overhead.
    if on_cpu:
        machine = measure_layers(machine, groups, heads)
    if groups.global_rank == 0:
        log.info("measured in %.2f s: %s", time.monotonic() - began, describe(machine))
        _write(path, machine)
    return machine


def describe(machine: Machine) -> str:
    """One line about a machine, for the log."""
    links = ", ".join(
        f"{link.bytes_per_s / 1e9:.3g} GB/s and {link.latency_s * 1e6:.0f} us among {size} ranks"
        for size, link in zip(machine.sp_levels, machine.links, strict=True)
        if size > 1
    )
    gather = "" if machine.gather_s is None else f"{machine.gather_s * 1e6:.0f} us to gather, "
    return (
        f"{links or 'no links'}; {gather}attention at {machine.flops_per_s / 1e9:.3g} GFLOP/s "
        "per rank, "
        f"{machine.call_s * 1e6:.0f} us a call, {machine.merge_s * 1e9:.2g} ns to merge "
        f"and {machine.copy_s * 1e9:.2g} ns to copy a number"
    )


def attention_speed(
    head_dim: int, dtype: torch.dtype, device: torch.device, control: Group
) -> dict[str, float]:
    """Speeds on the slowest rank while all compute, as in `Machine`.

    `flops_per_s` is of causal attention, `call_s` includes the merge of a small result; `merge_s`
    and `copy_s` are per number. Means, not best times: where ranks share cores, waiting for one is
    part of the price.
    """
    heads = 4 if device.type == "cpu" else 16
    tokens = max(64, int((_FLOPS[device.type] / (2 * heads * head_dim)) ** 0.5))
    q, k, v = torch.zeros(3, tokens, heads, head_dim, dtype=dtype, device=device)
    out, lse = attend_run(q, k, v, scale=1.0, q_start=0)
    sum_out = out.float()

    def attend_rows(rows: int) -> None:
        attend_run(q[:rows], k[:rows], v[:rows], scale=1.0, q_start=0)

    def attend_one() -> None:
        attend_rows(1)
        merge_two(sum_out[:1], lse[:1], out[:1], lse[:1])

    call_s = agree_most(_mean_s(attend_one, device), control)
    merge_s = agree_most(_mean_s(lambda: merge_two(sum_out, lse, out, lse), device), control)
    rows = torch.arange(tokens, device=device).flip(0)
    copy_s = agree_most(_mean_s(lambda: out.index_select(0, rows), device), control)
    attend_s = agree_most(_mean_s(lambda: attend_rows(tokens), device), control)
    flops = causal_pairs(range(tokens)) * heads * 4 * head_dim
    return {
        "flops_per_s": flops / max(attend_s - call_s, attend_s / 10),
        "call_s": call_s,
        "merge_s": merge_s / out.numel(),
        "copy_s": copy_s / out.numel(),
    }


def _mean_s(call: Callable[[], object], device: torch.device) -> float:
    """Mean seconds per call: the median of several means.

    The first call is left out, as it may compile or allocate; the median is taken because something
    else may run on the machine for a moment.
    """
    call()
    _finish(device)
    means = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for _ in range(_ROUNDS):
            call()
        _finish(device)
        means.append((time.perf_counter() - began) / _ROUNDS)
    return median(means)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a time means something only when the device is idle


def _ranks_per_core(hosts: list[str], control: Group) -> float:
    """Ranks that share a core, at least 1; the most of any host."""
    threads = hosts.count(hosts[control.rank]) * torch.get_num_threads()
    return agree_most(max(1.0, threads / len(os.sched_getaffinity(0))), control)


def _hosts(control: Group) -> list[str]:
    """Host name of each rank, cut to 64 bytes."""
    name = socket.gethostname().encode()[:64].ljust(64)
    rows = all_gather_rows(
        torch.frombuffer(bytearray(name), dtype=torch.uint8)[None], [1] * control.size, control
    )
    return [bytes(row.tolist()).decode(errors="replace").strip() for row in rows]


def _key(groups: ParallelGroups, heads: LayerHeads, device: torch.device, place: str) -> str:
    facts = (
        place,
        groups.tp.size,
        [level.size for level in groups.sp_levels],
        repr(heads),
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch.get_num_threads(),
        torch.__version__,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read(path: Path) -> Machine | None:
    try:
        if time.time() - path.stat().st_mtime > _MAX_AGE_S:
            return None
        return Machine.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is not used and measured again: %s", path, error)
        return None


def _write(path: Path, machine: Machine) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(machine.to_json())
        part.replace(path)
    except OSError as error:
        log.info("the measured machine is not kept: %s", error)
