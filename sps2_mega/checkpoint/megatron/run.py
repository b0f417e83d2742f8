"""Facts about the run that wrote a Megatron checkpoint: architecture, iteration, parallel layout.

Megatron-LM keeps its arguments in common.pt, with core 0.19 in the sharded object `common_state`;
Megatron Bridge writes run_config.yaml, whose `model` section uses megatron-core's names. Both
become the same mapping of arguments, which `settings.arguments` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sps2_mega.checkpoint.architecture import check_ranges
from sps2_mega.checkpoint.json_file import check_extent, read_yaml
from sps2_mega.checkpoint.megatron.metadata import Metadata
from sps2_mega.checkpoint.megatron.safe_pickle import load_torch_file
from sps2_mega.checkpoint.megatron.settings.arguments import saved_layout
from sps2_mega.checkpoint.megatron.settings.bridge import bridge_args
from sps2_mega.checkpoint.megatron.settings.hybrid import (
    HybridPattern,
    hybrid_pattern,
    without_pattern,
)
from sps2_mega.checkpoint.megatron.settings.table import short
from sps2_mega.checkpoint.megatron.vocabulary import config_of_run, end_tokens_of_run
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class Run:
    config: ModelConfig
    iteration: int | None
    saved_layout: tuple[int, int] | None
    pattern: HybridPattern | None


def read_run(
    folder: Path, config: ModelConfig | None, tokens: Path | None, metadata: Metadata
) -> Run:
    """Read the run of a torch_dist folder; `config` replaces the architecture in its files.

    `tokens` is the tokenizer's folder, which says how many tokens there are.

    Raises:
        CheckpointError: arguments would run code or are damaged, or the format is another one.
        ConfigError: the architecture is neither stated nor given, or cannot be run.
    """
    args, where, iteration = stored_args(folder, metadata, given=config is not None)
    layout = saved_layout(args)
    _check_format(args, layout, folder)
    if config is None and not args:
        raise ConfigError(
            f"{folder}: no arguments in common.pt or common_state and no run_config.yaml, so the "
            "architecture is unknown: pass it with --config NAME|FILE"
        )
    config, pattern = architecture_of(args, config, tokens, where)
    return Run(config, iteration_of(folder, iteration), layout, pattern)


def architecture_of(
    args: Mapping[str, Any], config: ModelConfig | None, tokens: Path | None, where: str
) -> tuple[ModelConfig, HybridPattern | None]:
    """Architecture in a run's arguments, unless it is given, and the pattern of a HybridModel.

    Raises:
        ConfigError: it cannot be run, or `config` has another number of layers than the pattern.
    """
    pattern = hybrid_pattern(args, where)
    if config is None:
        config = config_of_run(args, tokens, where)
    elif not config.eos_token_ids:
        config = replace(config, eos_token_ids=end_tokens_of_run(args, where))
    check_ranges(config, where)
    if pattern is not None and pattern.num_layers != config.num_layers:
        raise ConfigError(
            f"{where}: the hybrid layer pattern makes {pattern.num_layers} layers, the given "
            f"architecture has num_layers={config.num_layers}"
        )
    return config, pattern


def settings_of_gpt(args: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the GPT that computes the same as a HybridModel; others as they are."""
    try:
        pattern = hybrid_pattern(args, "")
    except ConfigError:
        pattern = None
    return dict(args) if pattern is None else without_pattern(args, pattern)


def iteration_of(folder: Path, stored: Any) -> int | None:
    """The stored iteration, else the one in the folder's name; None for a release."""
    if folder.name == "release":
        return None
    if isinstance(stored, int):
        return stored
    match = re.fullmatch(r"iter_(\d+)", folder.name)
    return int(match[1]) if match else None


def args_of(state: Any, where: str | Path) -> dict[str, Any]:
    """Arguments in a loaded common.pt or model_optim_rng.pt; empty if it has none."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{where} must hold a dict, found {type(state).__name__}")
    args = state.get("args")
    stated = dict(vars(args)) if hasattr(args, "__dict__") else {}
    check_extent(stated, f"{where}: args")
    # No setting is a tensor, and one could not be compared with a value.
    return {
        name: f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else value
        for name, value in stated.items()
    }


def stored_args(
    folder: Path, metadata: Metadata, *, given: bool = False
) -> tuple[dict[str, Any], str, Any]:
    """Arguments of a torch_dist folder, where they are stored, and the iteration.

    Where the architecture is `given`, a Bridge model of an unknown class has none.

    Raises:
        CheckpointError: they would run code or are damaged.
        ConfigError: run_config.yaml cannot be read, or what its model's class builds is not known.
    """
    common, run_config = folder / "common.pt", folder / "run_config.yaml"
    if common.is_file():
        state, where = load_torch_file(common), str(common)
    elif (state := metadata.load("common_state")) is not None:
        where = f"{folder}: common_state"
    else:
        # torch_dcp keeps every entry of the state as an object of its own.
        state = {name: metadata.load(name) for name in ("args", "iteration")}
        where = f"{folder}"
    args = args_of(state, where)
    if not args and run_config.is_file():
        content = read_yaml(run_config)
        try:
            args = bridge_args(content, str(run_config))
        except ConfigError:
            if not given:
                raise
        kept = content.get("checkpoint") if isinstance(content, Mapping) else None
        if isinstance(kept, Mapping) and "ckpt_format" in kept:
            args["ckpt_format"] = kept["ckpt_format"]
        return args, str(run_config), state.get("iteration")
    return args, f"{where} (args)", state.get("iteration")


def _check_format(args: Mapping[str, Any], layout: tuple[int, int] | None, folder: Path) -> None:
    kind = args.get("ckpt_format")
    if kind is not None and not isinstance(kind, str):
        raise CheckpointError(f"{folder}: ckpt_format={short(kind)} must be a text")
    if kind == "fsdp_dtensor":
        raise CheckpointError(
            f"{folder}: ckpt_format='fsdp_dtensor' is not supported: save it as torch_dist with "
            "Megatron, or export it to Hugging Face with Megatron Bridge"
        )
    if kind == "torch_dcp" and layout is not None and layout != (1, 1):
        raise CheckpointError(
            f"{folder}: ckpt_format='torch_dcp' of a run with (tp, pp) = {layout} holds the "
            "weights of one of its ranks only (needs (1, 1))"
        )
