"""Reader of Megatron's older checkpoints, one file per rank: mp_rank_TT[_PPP]/model_optim_rng.pt.

Each file holds one TP shard of one pipeline stage, with layers numbered from 0
within the stage. Files are memory-mapped, so optimizer state in them costs nothing;
`read` merges the TP shards of one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sps2_mega.checkpoint.canonical import OUTPUT_LAYER, WORD_EMBEDDINGS, Shape, split_layer
from sps2_mega.checkpoint.megatron.metadata import STORED_DTYPES
from sps2_mega.checkpoint.megatron.names import canonical_name
from sps2_mega.checkpoint.megatron.run import architecture_of, args_of, iteration_of
from sps2_mega.checkpoint.megatron.safe_pickle import load_torch_file
from sps2_mega.checkpoint.megatron.settings.arguments import saved_layout
from sps2_mega.checkpoint.megatron.settings.table import short
from sps2_mega.checkpoint.sharding import shard_dim
from sps2_mega.checkpoint.weight_source import WeightSource
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError, ConfigError

_LONGEST_NAME = 500
_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_OLDEST = 3.0  # older versions order query, key and value rows differently


class LegacySource(WeightSource):
    """A `WeightSource` over all rank files of one iteration, with one shard per TP rank."""

    format = "megatron legacy"

    def __init__(
        self, folder: Path, config: ModelConfig | None = None, *, tokens: Path | None = None
    ) -> None:
        self.path = folder
        grid = _rank_files(folder)
        states = [[load_torch_file(path, mmap=True) for path in stage] for stage in grid]
        for path, state in zip(chain(*grid), chain(*states), strict=True):
            if not isinstance(state, Mapping):
                raise CheckpointError(f"{path} must hold a dict, found {type(state).__name__}")
        args = args_of(states[0][0], grid[0][0])
        _check_version(states[0][0], grid[0][0])
        _check_kind(states[0][0], grid[0][0])
        if not args and config is None:
            raise ConfigError(
                f"{grid[0][0]}: a Megatron legacy file without `args`, so the architecture is "
                "unknown: pass it with --config NAME|FILE"
            )
        where = f"{grid[0][0]} (args)"
        self.config, self.pattern = architecture_of(args, config, tokens, where)
        self.iteration = iteration_of(folder, states[0][0].get("iteration"))
        self.saved_layout: tuple[int, int] | None = (len(grid[0]), len(grid))
        if saved_layout(args) not in (None, self.saved_layout):
            raise CheckpointError(
                f"{folder}: saved with (tp, pp) = {saved_layout(args)}, but the rank files are of "
                f"{self.saved_layout}: some are absent, or there are expert-parallel ones"
            )
        self._shards = self._collect(states)
        first = self._shards.get(WORD_EMBEDDINGS) or next(iter(self._shards.values()))
        self.dtype = str(first[0].dtype).removeprefix("torch.")

    def shapes(self) -> dict[str, Shape]:
        return {name: self._shape(name) for name in self._shards}

    def read(self, name: str) -> Tensor:
        shards, dim = self._shards[name], shard_dim(name)
        if dim is None or len(shards) == 1:
            return shards[0]
        if "mlp.linear_fc1." in name and self.config.gated:
            # Each rank has its gate rows above its up rows; the whole has all gates first.
            halves = [shard.chunk(2, 0) for shard in shards]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(shards, dim)

    def origin(self, name: str) -> str:
        return (
            f"{name} of every mp_rank_* file"
            if name in self._shards
            else "no mp_rank_* file has it"
        )

    def _shape(self, name: str) -> Shape:
        shards, dim = self._shards[name], shard_dim(name)
        shape = list(shards[0].shape)
        if dim is not None and dim < len(shape):
            shape[dim] = sum(shard.shape[dim] for shard in shards)
        return tuple(shape)

    def _collect(self, states: list[list[dict[str, Any]]]) -> dict[str, list[Tensor]]:
        shards: dict[str, list[Tensor]] = {}
        first_layer = 0
        for chunk in _chunks(states, self.path):
            layers = 0
            for name in chunk[0]:
                canonical = canonical_name(name)
                if canonical is None or not isinstance(chunk[0][name], Tensor):
                    continue
                _check_values(name, chunk, self.path)
                index, part = split_layer(canonical)
                if index is not None:
                    layers = max(layers, index + 1)
                    canonical = f"decoder.layers.{first_layer + index}.{part}"
                # The last of several stages keeps a copy of tied embeddings as its output layer.
                if not (canonical == OUTPUT_LAYER and self.config.tie_embeddings):
                    shards.setdefault(canonical, [model[name] for model in chunk])
            first_layer += layers
        if not shards:
            raise CheckpointError(f"{self.path}: the rank files hold no model weights")
        return shards


def stored_args(folder: Path) -> dict[str, Any]:
    """Arguments in the file of the first rank.

    Raises:
        CheckpointError: files are absent or damaged, or would run code.
    """
    first = _rank_files(folder)[0][0]
    return args_of(load_torch_file(first, mmap=True), first)


def _rank_files(folder: Path) -> list[list[Path]]:
    """Files as [pipeline stage][TP rank]; raises an error that lists absent ones."""
    ranks: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(entry.name)
        if match is None:
            raise CheckpointError(
                f"{folder}: {entry.name} is not supported (needs mp_rank_TT[_PPP])"
            )
        ranks[int(match[2] or 0), int(match[1])] = entry / _FILE
    stages, tp = (1 + max(key[i] for key in ranks) for i in (0, 1))
    wanted = [[ranks.get((pp, rank)) for rank in range(tp)] for pp in range(stages)]
    absent = [
        f"mp_rank_{rank:02d}" + (f"_{pp:03d}" if stages > 1 else "") + f"/{_FILE}"
        for pp, stage in enumerate(wanted)
        for rank, path in enumerate(stage)
        if path is None or not path.is_file()
    ]
    if absent:
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        raise CheckpointError(f"{folder}: absent: {', '.join(absent[:8])}{more}")
    return [[path for path in stage if path is not None] for stage in wanted]


def _chunks(states: list[list[dict[str, Any]]], folder: Path) -> Iterator[list[Mapping[str, Any]]]:
    """Model chunks in layer order, each as one state dict per TP rank.

    With interleaved stages the first chunk of every stage precedes the second of any.
    """
    keys = [key for key in ("model", *(f"model{i}" for i in range(64))) if key in states[0][0]]
    if not keys:
        raise CheckpointError(f"{folder}: no model in the rank files")
    for key in keys:
        for pp, stage in enumerate(states):
            if absent := [tp for tp, state in enumerate(stage) if key not in state]:
                raise CheckpointError(f"{folder}: no {key} at stage {pp}, TP ranks {absent}")
            chunk = [state[key] for state in stage]
            for tp, model in enumerate(chunk):
                if not isinstance(model, Mapping) or not all(_is_name(name) for name in model):
                    raise CheckpointError(
                        f"{folder}: {key} of stage {pp}, TP rank {tp}, must map names of weights "
                        f"to tensors, found {type(model).__name__}"
                    )
            yield chunk


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= _LONGEST_NAME


def _check_values(name: str, chunk: list[Mapping[str, Any]], folder: Path) -> None:
    """Check that a weight is there on every TP rank, as ordinary values of one type."""
    if absent := [tp for tp, model in enumerate(chunk) if name not in model]:
        raise CheckpointError(f"{folder}: {name} is absent at TP ranks {absent}")
    for value in (model[name] for model in chunk):
        kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        ordinary = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if not ordinary or kind not in STORED_DTYPES or value.dtype != chunk[0][name].dtype:
            known = ", ".join(STORED_DTYPES)
            raise CheckpointError(f"{folder}: {name} is stored as {kind} (needs one of {known})")


def _check_version(state: Mapping[str, Any], path: Path) -> None:
    version = state.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or not version >= _OLDEST:
        raise CheckpointError(
            f"{path}: checkpoint_version {short(version)} is not supported (needs >= {_OLDEST})"
        )


def _check_kind(state: Mapping[str, Any], path: Path) -> None:
    model = state.get("model", state.get("model0"))
    if isinstance(model, Mapping) and "language_model" in model:
        raise CheckpointError(
            f"{path}: a `language_model` of Megatron-LM before megatron-core, which is not "
            "supported (needs a GPTModel of megatron-core)"
        )
