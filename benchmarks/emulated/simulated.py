"""Simulation of what cluster.py measured: the same model, prompt, system and link, one request.

`emulated.hardware` gives calibrated rates and links, and the machine's speed while a rate was
measured. The runs of one rank alone between the others tell that speed: their first token for
prefill steps, the later tokens for decode steps. Nothing else is fitted. Decides which simulated
system stands for which measured one; the layout of figures is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.emulated.hardware import Calibrated, Speeds
from benchmarks.emulated.systems import SHAPES, shape_config
from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.engine import SimulatedEngine, scheduler_config
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.sparse_cost import sparse_cost
from sps2_mega.simulator.step_cost import StepCost, step_cost
from sps2_mega.simulator.system import System
from sps2_mega.types import SamplingParams
from sps2_mega.types import Sequence as Prompt

CALIBRATES = "alone"  # its measured times tell the machine's speed
_SPARSE = ("csa", "csa-alone", "csa-pipelined")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure (ttft or tbt) and its simulation, in seconds.

    `spread` is the range of the measured repeats over their median.
    """

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
        """Whether the machine's speed was taken from this very figure."""
        return self.system == CALIBRATES


def rows_of(document: Mapping[str, Any], folder: Path) -> tuple[list[Row], dict[str, float]]:
    """All figures of one result file of cluster.py, and the machine's speeds.

    Speeds are by shape, prompt length, rate and phase.

    Raises:
        ConfigError: a calibration is missing, or nothing ran on one rank alone.
    """
    rows: list[Row] = []
    speeds = {}
    for run in document["runs"]:
        shape = shape_of(run)
        calibrated = Calibrated.named(shape, int(document["nodes"]), folder)
        speed_at = _speeds(document, run, calibrated)
        for rate, speed in speed_at.items():
            for what, value in dataclasses.asdict(speed).items():
                speeds[f"{shape}, {run['tokens']} tokens, {rate}, {what}"] = value
        for name, by_rate in run["curves"].items():
            for rate, measured in by_rate.items():
                simulated = times(document, run, name, rate, calibrated, speeds=speed_at[rate])
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
    speeds: Speeds,
) -> dict[str, float]:
    """Simulated `ttft` and `tbt` (0 without decode) of one system at one rate."""
    ranks = 1 if name.endswith("alone") else int(document["nodes"])
    prefill = calibrated.hardware(ranks, rate, speed=speeds.prefill)
    decode = calibrated.hardware(ranks, None, speed=speeds.decode)
    return {
        "ttft": _on(prefill, document, run, name, ranks, calibrated.shape)["ttft"],
        "tbt": _on(decode, document, run, name, ranks, calibrated.shape)["tbt"],
    }


def _on(
    hardware: Hardware,
    document: Mapping[str, Any],
    run: Mapping[str, Any],
    name: str,
    ranks: int,
    shape: str,
) -> dict[str, float]:
    """Simulate one request through the project's scheduler on that hardware."""
    model = shape_config(SHAPES[shape])
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
    """Cost model of a system of cluster.py by its name; `csa` as in the result file.

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
) -> dict[str, Speeds]:
    """Simulated over measured times of one rank alone, by rate."""
    alone = run["curves"].get(CALIBRATES)
    if not alone:
        raise ConfigError(f"the runs have no system {CALIBRATES!r}, which tells the speed")
    speeds = {}
    for rate, found in alone.items():
        expected = times(document, run, CALIBRATES, rate, calibrated, speeds=Speeds())
        tbt_s = found.get("tbt_s")
        speeds[rate] = Speeds(
            prefill=expected["ttft"] / found["ttft_s"],
            decode=expected["tbt"] / tbt_s if tbt_s else 1.0,
        )
    return speeds


def _spread(bounds: Sequence[float] | None, seconds: float) -> float:
    return (bounds[1] - bounds[0]) / seconds if bounds else 0.0


def shape_of(run: Mapping[str, Any]) -> str:
    """Name in `SHAPES`; older result files have only its description."""
    named: str | None = run.get("shape")
    return named or next(shape.name for shape in SHAPES.values() if shape.about == run["model"])
