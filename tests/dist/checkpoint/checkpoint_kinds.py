"""Folders as other writers than Megatron-LM's `torch_dist` and legacy ones make them.

`torch_dcp` and `fsdp_dtensor` are what `--ckpt-format` of Megatron-LM calls them; Megatron Bridge
keeps files of its own beside a `torch_dist` iteration. As in `checkpoint_writer`, all tensors come
from megatron-core's modules on real ranks.
"""

from __future__ import annotations

import enum
import functools
import inspect
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

from dist.checkpoint import checkpoint_writer as writer

from sps2_mega.config import ModelConfig


def write_torch_dcp(
    rank: int,
    root: Path,
    config: ModelConfig,
    tp: int,
    pp: int,
    vpp: int = 1,
    *,
    std: float = 1.0,
    fsdp: bool = False,
    ckpt_format: str = "torch_dcp",
    with_args: bool = True,
) -> None:
    """Write the state by torch.distributed.checkpoint itself, without Megatron's own index.

    With `fsdp` megatron-core's wrapper shards every parameter over the data-parallel ranks, so the
    state holds DTensors.
    """
    import torch
    import torch.distributed.checkpoint as dcp

    chunks = writer.build_chunks(config, tp, pp, vpp, std)
    if fsdp:
        chunks = [_fully_sharded(chunk) for chunk in chunks]
    content = {
        "checkpoint_version": 3.0,
        "iteration": writer.ITERATION,
        **writer.by_chunk([chunk.state_dict_for_save_checkpoint() for chunk in chunks]),
        "optimizer": writer.adam_state([p for chunk in chunks for p in chunk.parameters()]),
        "num_floating_point_operations_so_far": 0,
    }
    if with_args:
        content["args"] = writer.megatron_args(config, tp, pp, vpp, ckpt_format)
    folder = writer.iteration_folder(rank, root)
    dcp.save(content, storage_writer=dcp.FileSystemWriter(str(folder)))
    torch.distributed.barrier()
    if rank == 0:
        writer.write_tracker(root)


def write_bridge(
    rank: int,
    root: Path,
    config: ModelConfig,
    tp: int,
    pp: int,
    vpp: int = 1,
    *,
    std: float = 1.0,
    ckpt_format: str = "torch_dist",
) -> None:
    """Write the folder of a training run by Megatron Bridge: its settings are in run_config.yaml.

    The `model` section has every field of the running megatron-core's TransformerConfig.
    """
    import torch
    import yaml

    options: dict[str, Any] = dict(std=std, with_args=False)
    if ckpt_format == "torch_dist":
        writer.write_torch_dist(rank, root, config, tp, pp, vpp, **options)
    else:
        write_torch_dcp(rank, root, config, tp, pp, vpp, fsdp=True, **options)
    if rank == 0:
        folder = root / f"iter_{writer.ITERATION:07d}"
        state = {
            "step": torch.tensor(writer.ITERATION),
            "consumed_train_samples": torch.tensor(800),
            "skipped_train_samples": torch.tensor(0),
            "consumed_valid_samples": torch.tensor(0),
            "floating_point_operations_so_far": torch.tensor(0.0),
            "do_train": torch.tensor(True),
            "do_valid": torch.tensor(False),
            "do_test": torch.tensor(False),
        }
        torch.save(state, folder / "train_state.pt")
        torch.save(state, root / "latest_train_state.pt")
        run_config = {
            "_target_": "megatron.bridge.training.config.ConfigContainer",
            "checkpoint": {
                "_target_": "megatron.bridge.training.config.CheckpointConfig",
                "ckpt_format": ckpt_format,
                "save": str(root),
            },
            "model": _provider(config, tp, pp, vpp),
        }
        (folder / "run_config.yaml").write_text(yaml.safe_dump(run_config))
        _save_tokenizer(config.vocab_size, folder / "tokenizer")
    torch.distributed.barrier()


def write_settings(
    rank: int, root: Path, settings: dict[str, Any], tokens: list[list[int]]
) -> list[Any]:
    """Write a model with Megatron-LM's arguments `settings`, as megatron-core builds it.

    Returns megatron-core's own logits [T, rows] of every prompt.
    """
    import harness
    from dist.checkpoint import stock_megatron
    from megatron.core import parallel_state

    harness.default_group()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    model, logits = stock_megatron.stock_run(settings, bridge=False, prompts=tokens)
    metadata = {"dp_cp_group": writer.data_parallel_group()}
    content = {
        "args": Namespace(**settings),
        "checkpoint_version": 3.0,
        "iteration": writer.ITERATION,
        "model": model.sharded_state_dict(metadata=metadata),
    }
    writer.save_torch_dist(rank, root, content)
    return logits


def _fully_sharded(model: Any) -> Any:
    """The model in megatron-core's wrapper for torch's FSDP2, which asks for a mesh of CUDA."""
    import megatron.core.distributed.torch_fully_sharded_data_parallel as core
    from megatron.core.distributed import DistributedDataParallelConfig
    from torch.distributed import DeviceMesh

    on_cpu = mock.Mock(from_group=lambda group, _: DeviceMesh.from_group(group, "cpu"))
    with mock.patch.object(core, "DeviceMesh", on_cpu):
        return core.TorchFullyShardedDataParallel(
            model.config, DistributedDataParallelConfig(), model
        )


def _provider(config: ModelConfig, tp: int, pp: int, vpp: int) -> dict[str, Any]:
    """The section `model`: all fields of a provider, which is a TransformerConfig and more."""
    from sps2_mega.checkpoint.sharding import VOCAB_MULTIPLE

    transformer = writer.transformer_config(config, tp, pp, vpp)
    return {
        "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
        **{
            field.name: _described(getattr(transformer, field.name))
            for field in fields(transformer)
        },
        "vocab_size": config.vocab_size,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "seq_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": config.tie_embeddings,
        "position_embedding_type": "learned_absolute" if config.rope is None else "rope",
        "rotary_base": 10000 if config.rope is None else int(config.rope.theta),
        "rotary_percent": 1.0,
        "rope_scaling": False,
        "rope_scaling_factor": 1.0,
        "seq_len_interpolation_factor": None,
        "parallel_output": True,
    }


def _described(value: Any) -> Any:
    """A field of a dataclass in YAML's terms, objects as what makes them again."""
    import torch

    if isinstance(value, torch.dtype):
        return {"_target_": str(value), "_call_": False}
    if isinstance(value, enum.Enum):
        kind = type(value)
        target = f"{kind.__module__}.{kind.__qualname__}"
        return {"_target_": target, "_call_": True, "_args_": [value.value], "_name_": value.name}
    if isinstance(value, functools.partial):
        target = {"_target_": _name(value.func), "_partial_": True, "_args_": list(value.args)}
        return target | value.keywords
    if callable(value):
        return {"_target_": _name(value), "_call_": False}
    if isinstance(value, (list, tuple)):
        return [_described(one) for one in value]
    if isinstance(value, dict):
        return {name: _described(one) for name, one in value.items()}
    return value


def _name(function: Any) -> str:
    return f"{inspect.getmodule(function).__name__}.{function.__qualname__}"


def _save_tokenizer(size: int, folder: Path) -> None:
    import tokenizer_samples
    import tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{id}": id for id in range(3, size)}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    tokenizer_samples.save(tokenizers.Tokenizer(model), folder)
