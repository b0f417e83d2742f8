"""The simulator's answer to what cluster.py measured: the same model, prompt, system and link, one request at a time.

    calibrated-SHAPE-RANKS.yaml   rates of so many ranks at once, and links at the probed rates (calibrate.py)
    speed                         how much faster the machine was than in the calibration, told by the runs of one rank alone
                                  between the others at the same rate; it divides all that a rank does, and no link

Nothing else is fitted. Decides which simulated system stands for which measured one, and no figures' layout.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.engine import SimulatedEngine, scheduler_config
from sps2_mega.simulator.hardware import Hardware, load_hardware
from sps2_mega.simulator.sparse_cost import sparse_cost
from sps2_mega.simulator.step_cost import StepCost, step_cost
from sps2_mega.simulator.system import System
from sps2_mega.types import SamplingParams
from sps2_mega.types import Sequence as Prompt
from tools.bench.cluster_nodes import parse_rate
from tools.bench.cluster_systems import SHAPES, shape_config

CALIBRATES = ("alone",)  # their measured times tell the machine's speed
_SPARSE = ("csa", "csa-alone", "csa-pipelined")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure and its simulation, seconds; `figure` is ttft or tbt. `spread` is how far apart the repeats of
    the measurement are, over their middle."""

    shape: str
    nodes: int
    tokens: int
    system: str
    rate: str
    figure: str
    measured_s: float
    simulated_s: float
    spread: float = 0.0

    @property
    def error(self) -> float:
        return self.simulated_s / self.measured_s - 1.0

    @property
    def calibrates(self) -> bool:
        return self.system in CALIBRATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """Hardware files by number of ranks, for one shape."""

    shape: str
    files: Mapping[int, Path]

    @staticmethod
    def found(shape: str, folder: Path) -> Calibrated:
        """Those of `folder`, by their names."""
        files = {}
        for path in folder.glob(f"calibrated-{shape}-*.yaml"):
            ranks = path.stem.rpartition("-")[2]
            if ranks.isdecimal():
                files[int(ranks)] = path
        return Calibrated(shape=shape, files=files)

    def hardware(self, ranks: int, rate: str, *, speed: float) -> Hardware:
        """Of so many ranks, one in each node, joined by links of that rate.

        Raises:
            ConfigError: nobody calibrated for so many ranks.
        """
        if ranks not in self.files:
            raise ConfigError(
                f"no calibrated-{self.shape}-{ranks}.yaml (there are: {sorted(self.files) or 'none'}): "
                "write it with tools/bench/calibrate.py"
            )
        hardware = load_hardware(str(self.files[ranks]))
        hardware = faster(hardware, speed).replace(gpus_per_node=1)
        if ranks == 1:
            return hardware
        linked = linked_at(self.files[ranks], rate)
        return hardware.replace(
            inter_node=linked.inter_node,
            exchange_factor=linked.exchange_factor,
            stream_factor=linked.stream_factor,
            reduce_factor=linked.reduce_factor,
            reduce_latency_s=linked.reduce_latency_s,
        )


def faster(hardware: Hardware, speed: float) -> Hardware:
    """The same machine on a day on which it does everything so many times as fast; links stay."""
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
    """The file's hardware with its probed link of that rate; between two probed rates, what a link of this rate reaches is
    told from the nearer one.

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


def rows_of(document: Mapping[str, Any], folder: Path) -> tuple[list[Row], dict[str, float]]:
    """All figures of one result file of cluster.py, and the machine's speed by shape, prompt length and rate.

    Raises:
        ConfigError: a calibration is missing, or nothing ran on one rank alone.
    """
    rows: list[Row] = []
    speeds = {}
    for run in document["runs"]:
        shape = shape_of(run)
        calibrated = Calibrated.found(shape, folder)
        speed_at = _speeds(document, run, calibrated)
        for rate, speed in speed_at.items():
            speeds[f"{shape}, {run['tokens']} tokens, {rate}"] = speed
        for name, by_rate in run["curves"].items():
            for rate, measured in by_rate.items():
                simulated = times(document, run, name, rate, calibrated, speed=speed_at[rate])
                for figure in ("ttft", "tbt"):
                    seconds = measured.get(f"{figure}_s")
                    if seconds:
                        rows.append(
                            Row(
                                shape=shape,
                                nodes=document["nodes"],
                                tokens=run["tokens"],
                                system=name,
                                rate=rate,
                                figure=figure,
                                measured_s=seconds,
                                simulated_s=simulated[figure],
                                spread=_spread(measured.get(f"{figure}_range_s"), seconds),
                            )
                        )
    return rows, speeds


def times(
    document: Mapping[str, Any],
    run: Mapping[str, Any],
    name: str,
    rate: str,
    calibrated: Calibrated,
    *,
    speed: float,
) -> dict[str, float]:
    """Simulated `ttft` and `tbt` (0 without decode) of one system at one rate."""
    ranks = 1 if name.endswith("alone") else int(document["nodes"])
    hardware = calibrated.hardware(ranks, rate, speed=speed)
    model = shape_config(SHAPES[calibrated.shape])
    cost = cost_of(name, model, hardware, ranks, document["csa"], tokens=run["tokens"])
    engine = SimulatedEngine(
        cost, scheduler_config(cost), max_model_len=run["tokens"] + run.get("decode", 0) + 2
    )
    arrival = Arrival(time_s=0.0, prompt_len=run["tokens"], output_len=1 + run.get("decode", 0))
    sequence = Prompt(
        seq_id=0,
        prompt_token_ids=arrival.token_ids(0),
        params=SamplingParams(temperature=0.0, ignore_eos=True),
        seed=0,
        max_tokens=arrival.output_len,
        arrival_time=0.0,
    )
    refusal = engine.add(sequence)
    assert refusal is None, f"{name}: {refusal}"
    now, end = 0.0, engine.start_step(0.0)
    while end is not None:
        now = end
        engine.finish_step(now)
        end = engine.start_step(now)
    first, *others = sequence.token_times
    gaps = [b - a for a, b in zip([first, *others], others, strict=False)]
    return {"ttft": first, "tbt": statistics.median(gaps) if gaps else 0.0}


def cost_of(
    name: str,
    model: ModelConfig,
    hardware: Hardware,
    ranks: int,
    csa: Mapping[str, Any],
    *,
    tokens: int,
) -> StepCost:
    """The cost model of a system of cluster.py by its name; `csa` as in the result file.

    Raises:
        ConfigError: no such system.
    """
    system = System(name=name, elastic=False, pipelined=not _plain(name))
    if name.startswith("tp-chunked-"):
        chunk = int(name.removeprefix("tp-chunked-"))
        system = system.replace(policy="sarathi", chunk_tokens=chunk, tp=ranks)
    elif name == "tp":
        system = system.replace(tp=ranks)
    elif name.split("-")[0] in ("ring", "ulysses"):
        system = system.replace(sp=ranks, transports=(name.split("-")[0],))
    elif name in _SPARSE:
        system = system.replace(sp=ranks)
    elif name != "alone":
        raise ConfigError(f"no simulated system stands for {name!r}")
    cost = step_cost(system, model, hardware, tp=system.tp, sp=system.sp)
    if name not in _SPARSE:
        return cost
    degrees = tuple(int(degree) for degree in str(csa["degrees"]).split(","))
    sparse = sparse_cost(
        CSAConfig(degrees=degrees, spans=(-(-tokens // int(csa["cells"])),)),
        hardware.sp_machine(1, ranks),
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        itemsize=cost.size.itemsize,
        length=tokens,
    )
    return dataclasses.replace(cost, sparse=sparse.forced("gather"))


def _plain(name: str) -> bool:
    """Whether a system runs without the pipeline."""
    return name in ("ulysses", "csa", "csa-alone", "alone")


def _speeds(
    document: Mapping[str, Any], run: Mapping[str, Any], calibrated: Calibrated
) -> dict[str, float]:
    """By rate: simulated over measured first token time of one rank alone."""
    alone = run["curves"].get(CALIBRATES[0])
    if not alone:
        raise ConfigError(f"the runs have no system {CALIBRATES[0]!r}, which tells the speed")
    return {
        rate: times(document, run, CALIBRATES[0], rate, calibrated, speed=1.0)["ttft"]
        / found["ttft_s"]
        for rate, found in alone.items()
    }


def _spread(bounds: Sequence[float] | None, seconds: float) -> float:
    return (bounds[1] - bounds[0]) / seconds if bounds else 0.0


def shape_of(run: Mapping[str, Any]) -> str:
    """The name in `SHAPES`; older result files have its description only."""
    named: str | None = run.get("shape")
    return named or next(shape.name for shape in SHAPES.values() if shape.about == run["model"])
