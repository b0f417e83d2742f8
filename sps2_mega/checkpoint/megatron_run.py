"""Facts about the run that wrote a Megatron checkpoint: architecture, iteration, parallel layout.

Megatron-LM keeps its arguments in common.pt, with core 0.19 in the sharded object
`common_state`; Megatron Bridge writes
run_config.yaml, whose `model` section uses megatron-core's names. Both become the
same mapping of arguments, which `megatron_args` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sps2_mega.checkpoint.megatron_args import model_config_from_args, saved_layout
from sps2_mega.checkpoint.safe_pickle import load_torch_file
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class Run:
    config: ModelConfig
    iteration: int | None
    saved_layout: tuple[int, int] | None


def read_run(folder: Path, config: ModelConfig | None, common_state: Mapping[str, Any]) -> Run:
    """Read the run of a torch_dist folder; `config` replaces the architecture in its files.

    `common_state` is the sharded object of that name; it counts where there is no common.pt.

    Raises:
        CheckpointError: common.pt would run code or is damaged.
        ConfigError: the architecture is neither stated nor given, or cannot be run.
    """
    args, where, iteration = _stored_args(folder, common_state)
    if config is None:
        if not args:
            raise ConfigError(
                f"{folder}: no arguments in common.pt or common_state and no "
                "run_config.yaml, so the "
                "architecture is unknown: "
                "pass it (a name in model_configs/)"
            )
        config = model_config_from_args(args, where)
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


def bridge_args(content: Any, where: str) -> dict[str, Any]:
    """The `model` section of a run_config.yaml, in terms of Megatron-LM's arguments.

    Raises:
        ConfigError: there is no `model` section, or its activation is not known.
    """
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping):
        raise ConfigError(f"{where}: no `model` section")
    tied = model.get("share_embeddings_and_output_weights", True)
    activation = str(model.get("activation_func") or "gelu").lower()
    gated = bool(model.get("gated_linear_unit", False))
    if gated != ("silu" in activation) or not any(x in activation for x in ("silu", "gelu")):
        raise ConfigError(
            f"{where}: activation_func={model.get('activation_func')!r} with "
            f"gated_linear_unit={gated} is "
            "not supported (gated SiLU or plain GELU)"
        )
    return dict(model) | {
        "group_query_attention": model.get("num_query_groups") is not None,
        "swiglu": gated,
        "bias_gelu_fusion": model.get("bias_activation_fusion", False),
        "untie_embeddings_and_output_weights": not tied,
        "max_position_embeddings": model.get("max_position_embeddings") or model.get("seq_length"),
    }


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
