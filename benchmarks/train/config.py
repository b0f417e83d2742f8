"""Training configuration: frozen dataclasses and the strict reading of one YAML file.

Decides which fields exist and what is refused. sps2-tiny.yaml says beside the numbers what they
mean for the weights; there are no defaults here, so that a run is what its file says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sps2_mega.checkpoint.architecture import check_keys, model_config_from_mapping
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError

MODEL_CONFIGS = Path(__file__).resolve().parents[2] / "model_configs"


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """Files of the standard library to read; `exclude` names folders, at any depth."""

    hold_out_every: int
    max_file_bytes: int
    exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    muon_lr: float
    adam_lr: float
    momentum: float
    weight_decay: float
    warmup_steps: int
    decay_from: float
    final_lr: float
    max_grad_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """`steps` batches of `batch` sequences of `length` tokens.

    `mix` is the share of each kind of document: "code" or one of `tasks.KINDS`.
    """

    length: int
    batch: int
    steps: int
    jump: float
    max_position: int
    mix: dict[str, float]

    def __post_init__(self) -> None:
        if self.max_position < self.length:
            raise ConfigError(
                f"a stage of {self.length} tokens needs max_position >= {self.length},"
                f" got {self.max_position}"
            )
        if min(self.length, self.batch, self.steps) < 1:
            raise ConfigError(f"length, batch and steps of a stage are at least 1, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run on one kind of device."""

    architecture: ModelConfig
    seed: int
    corpus: CorpusConfig
    optimizer: OptimizerConfig
    stages: tuple[Stage, ...]
    compile: bool
    log_every: int
    checkpoint_every: int

    @property
    def num_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """Stage of step `step` (from 0)."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"the run has {self.num_steps} steps")

    def fingerprint(self) -> str:
        """Hash of everything that influences the weights; resuming needs an equal one."""
        fields = dataclasses.asdict(self)
        for name in ("log_every", "checkpoint_every", "compile"):
            del fields[name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def load_train_config(path: Path, device: str) -> TrainConfig:
    """Read the run of `device` ("cpu" or "cuda") from a YAML file.

    Raises:
        ConfigError: a field is missing, unknown or of the wrong type, or the device has no run.
    """
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    where = str(path)
    known = {f.name for f in dataclasses.fields(TrainConfig)} - {"stages", "compile"} | {
        "mixes",
        "runs",
    }
    _check(given, known, where)
    if device not in given["runs"]:
        raise ConfigError(f"{where}: runs has no {device!r}, only {sorted(given['runs'])}")
    run = given["runs"][device]
    _check(run, {"compile", "stages"}, f"{where}: runs.{device}")
    mixes = {name: _mix(mix, f"{where}: mixes.{name}") for name, mix in given["mixes"].items()}
    stages = tuple(
        _stage(stage, mixes, f"{where}: runs.{device}.stages[{i}]")
        for i, stage in enumerate(run["stages"])
    )
    corpus = dict(given["corpus"])
    corpus["exclude"] = tuple(corpus.get("exclude", ()))
    # A longer run on a larger device gives a model of a longer context; nothing else differs.
    architecture = dataclasses.replace(
        _architecture(given["architecture"], where),
        max_position_embeddings=max(stage.max_position for stage in stages),
    )
    return TrainConfig(
        architecture=architecture,
        seed=given["seed"],
        corpus=_build(CorpusConfig, corpus, f"{where}: corpus"),
        optimizer=_build(OptimizerConfig, given["optimizer"], f"{where}: optimizer"),
        stages=stages,
        compile=run["compile"],
        log_every=given["log_every"],
        checkpoint_every=given["checkpoint_every"],
    )


def _architecture(name: str, where: str) -> ModelConfig:
    file = MODEL_CONFIGS / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"{where}: architecture {name!r}: model_configs/ has no {file.name}")
    described = yaml.safe_load(file.read_text(encoding="utf-8"))
    return model_config_from_mapping(described["architecture"], str(file))


def _mix(given: dict[str, float], where: str) -> dict[str, float]:
    from benchmarks.train.tasks import KINDS

    check_keys(given, {"code", *KINDS}, where)
    if abs(sum(given.values()) - 1) > 1e-6 or min(given.values()) < 0:
        raise ConfigError(f"{where}: the shares must sum to 1, got {sum(given.values()):g}")
    return dict(given)


def _stage(given: dict[str, Any], mixes: dict[str, dict[str, float]], where: str) -> Stage:
    if given.get("mix") not in mixes:
        raise ConfigError(f"{where}: mix must be one of {sorted(mixes)}, got {given.get('mix')!r}")
    return _build(Stage, given | {"mix": mixes[given["mix"]]}, where)


def _build(cls: Any, given: dict[str, Any], where: str) -> Any:
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    _check(given, set(fields), where)
    allowed = {
        "int": int,
        "float": (int, float),
        "tuple[str, ...]": tuple,
        "dict[str, float]": dict,
    }
    for name, value in given.items():
        if not isinstance(value, allowed[fields[name]]) or isinstance(value, bool):
            raise ConfigError(f"{where}: {name} must be {fields[name]}, got {value!r}")
    return cls(**given)


def _check(given: dict[str, Any], known: set[str], where: str) -> None:
    check_keys(given, known, where)
    missing = known - given.keys()
    if missing:
        raise ConfigError(f"{where}: {', '.join(sorted(missing))} missing")
