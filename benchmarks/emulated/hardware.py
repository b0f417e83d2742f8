"""The emulated cluster as hardware of the simulator.

    calibrated-SHAPE-NODES.yaml         rates of that many ranks at once, and links at the rates
                                        probed (calibrate.py)
    calibrated-SHAPE-NODES-alone.yaml   rates of one of them alone
    speed                               speed of the machine relative to its calibration; it divides
                                        all times of a rank, and no link's

A decode step sends some KB, less than the bucket of an emulated link lets pass at once
(`emulated.nodes`): at any rate they travel as fast as on the fastest link.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.emulated.nodes import parse_rate
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.hardware import Hardware, load_hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Speeds of the machine relative to its calibration; 2.0 is twice as fast."""

    prefill: float = 1.0
    decode: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """Hardware files of one shape on one cluster, for all ranks at once and for one alone.

    They are measured in turn.
    """

    shape: str
    together: Path
    alone: Path

    @staticmethod
    def named(shape: str, nodes: int, folder: Path) -> Calibrated:
        """Files by their conventional names, whether or not they exist."""
        together = folder / f"calibrated-{shape}-{nodes}.yaml"
        alone = folder / f"calibrated-{shape}-{nodes}-alone.yaml"
        return Calibrated(shape=shape, together=together, alone=alone)

    @property
    def complete(self) -> bool:
        return self.together.is_file() and self.alone.is_file()

    def hardware(self, ranks: int, rate: str | None, *, speed: float) -> Hardware:
        """Hardware of one rank, or of all, one in each node; `rate` None is the fastest link.

        Raises:
            ConfigError: a file is missing, or has no such link.
        """
        path = self.alone if ranks == 1 else self.together
        if not path.is_file():
            raise ConfigError(f"{path} is missing: write it with benchmarks/calibrate.py")
        hardware = faster(load_hardware(str(path)), speed).replace(gpus_per_node=1)
        if ranks == 1 or rate is None:
            return hardware
        linked = linked_at(path, rate)
        return hardware.replace(
            inter_node=linked.inter_node,
            exchange_factor=linked.exchange_factor,
            stream_factor=linked.stream_factor,
            reduce_factor=linked.reduce_factor,
            reduce_latency_s=linked.reduce_latency_s,
        )


def faster(hardware: Hardware, speed: float) -> Hardware:
    """The same machine with all times of a rank divided by `speed`; links stay."""
    return hardware.replace(
        peak_flops_per_s=hardware.peak_flops_per_s * speed,
        memory_bytes_per_s=hardware.memory_bytes_per_s * speed,
        kv_bytes_per_s=hardware.kv_bytes_per_s * speed,
        **{
            name: getattr(hardware, name) / speed
            for name in ("layer_overhead_s", "step_overhead_s", "call_s", "merge_s", "copy_s")
        },
    )


def linked_at(path: Path, rate: str) -> Hardware:
    """Hardware of the file with its probed link of that rate.

    Between two probed rates, the nearer one gives the share of the line that is reached.

    Raises:
        ConfigError: the file has no probed links, or the rate is free and was not probed.
    """
    links = yaml.safe_load(path.read_text())["links"]
    probed = {name.removeprefix("between-"): name for name in links if name.startswith("between-")}
    if rate in probed:
        return load_hardware(str(path), inter_node=probed[rate])
    wanted = parse_rate(rate)
    shaped = {name: parse_rate(name) for name in probed}
    known = {name: bits for name, bits in shaped.items() if bits is not None}
    if wanted is None or not known:
        raise ConfigError(f"{path} has no link of {rate}: probed are {sorted(probed) or 'none'}")
    near = min(known, key=lambda name: abs(math.log(known[name] / wanted)))
    hardware = load_hardware(str(path), inter_node=probed[near])
    link = hardware.inter_node
    faster_link = dataclasses.replace(link, bytes_per_s=link.bytes_per_s * wanted / known[near])
    return hardware.replace(inter_node=faster_link)
