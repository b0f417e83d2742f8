"""Facts about the run that wrote a Megatron checkpoint: architecture, iteration, parallel layout.

Megatron-LM keeps its arguments in common.pt, with core 0.19 in the sharded object `common_state`;
Megatron Bridge writes run_config.yaml, whose `model` section uses megatron-core's names. Both
become the same mapping of arguments, which `settings.arguments` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sps2_mega.checkpoint.megatron.safe_pickle import load_torch_file
from sps2_mega.checkpoint.megatron.settings.arguments import saved_layout
from sps2_mega.checkpoint.megatron.settings.bridge import bridge_args
from sps2_mega.checkpoint.megatron.vocabulary import config_of_run
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class Run:
    config: ModelConfig
    iteration: int | None
    saved_layout: tuple[int, int] | None


def read_run(
    folder: Path,
    config: ModelConfig | None,
    tokens: Path | None,
    common_state: Mapping[str, Any],
) -> Run:
    """Read the run of a torch_dist folder; `config` replaces the architecture in its files.

    `tokens` is the tokenizer's folder, which says how many tokens there are; `common_state` is the
    sharded object of that name, which counts where there is no common.pt.

    Raises:
        CheckpointError: common.pt would run code or is damaged.
        ConfigError: the architecture is neither stated nor given, or cannot be run.
    """
    args, where, iteration = _stored_args(folder, common_state)
    if config is None:
        if not args:
            raise ConfigError(
                f"{folder}: no arguments in common.pt or common_state and no run_config.yaml, so "
                "the architecture is unknown: pass it with --config NAME|FILE"
            )
        config = config_of_run(args, tokens, where)
    return Run(config, iteration_of(folder, iteration), saved_layout(args))


def iteration_of(folder: Path, stored: Any) -> int | None:
    """The stored iteration, else the one in the folder's name; None for a release."""
    if folder.name == "release":
        return None
    if isinstance(stored, int):
        return stored
    match = re.fullmatch(r"iter_(\d+)", folder.name)
    return int(match[1]) if match else None


def args_of(state: Any, path: Path) -> dict[str, Any]:
    """Arguments in a loaded common.pt or model_optim_rng.pt; empty if it has none."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} must hold a dict, found {type(state).__name__}")
    args = state.get("args")
    return dict(vars(args)) if hasattr(args, "__dict__") else {}


def _stored_args(folder: Path, common_state: Mapping[str, Any]) -> tuple[dict[str, Any], str, Any]:
    common, run_config = folder / "common.pt", folder / "run_config.yaml"
    where = f"{common if common.is_file() else f'{folder}: common_state'} (args)"
    state = load_torch_file(common) if common.is_file() else common_state
    args = args_of(state, common)
    if not args and run_config.is_file():
        try:
            content = yaml.safe_load(run_config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {run_config}: {error}") from None
        return bridge_args(content, str(run_config)), str(run_config), state.get("iteration")
    return args, where, state.get("iteration")
