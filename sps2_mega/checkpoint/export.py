"""Export of a source to another format: Hugging Face folder or Megatron `torch_dist` folder.

Tensors keep their stored dtype, bit for bit, and are streamed. The file by which readers recognise
the folder is written last, so an interrupted conversion is never taken for a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sps2_mega.checkpoint.canonical import VOCAB_NAMES, canonical_shapes
from sps2_mega.checkpoint.huggingface import layout as hf_layout
from sps2_mega.checkpoint.huggingface import writer as hf_writer
from sps2_mega.checkpoint.huggingface.config import model_config_from_hf, model_config_to_hf
from sps2_mega.checkpoint.inventory import check_complete
from sps2_mega.checkpoint.megatron import torch_dist_writer
from sps2_mega.checkpoint.megatron.settings.arguments import model_config_to_args
from sps2_mega.checkpoint.sharding import padded_vocab_size, shard
from sps2_mega.checkpoint.source import (
    TRACKER,
    WeightSource,
    read_canonical,
    tokenizer_folder,
)
from sps2_mega.checkpoint.vocabulary import with_end_tokens
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.text.chat_template import NAMED_FOLDER
from sps2_mega.text.tokenizer import Tokenizer

_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
OnBytes = Callable[[int, int], None]


def export_huggingface(
    source: WeightSource,
    target: Path,
    *,
    tokens: Path | None = None,
    on_bytes: OnBytes | None = None,
    file_bytes: int = hf_writer.FILE_BYTES,
) -> None:
    """Write a folder that transformers opens: config.json, safetensors and tokenizer.

    Several safetensors files get an index. `tokens` is the tokenizer's folder (default: the one
    that lies with the source); it says which tokens end a text where the source does not.

    Raises:
        ConfigError: the target is not empty, the tokenizer cannot be read, or Hugging Face's
            classes cannot express the architecture.
        CheckpointError: the source does not hold exactly the model.
    """
    config = source.config
    tokens = tokens or tokenizer_folder(source.path)
    hf = _expressible(_with_ends(config, tokens))
    recipes = hf_layout.recipes(config)
    progress = _start(source, target, on_bytes)
    prefix = hf_layout.prefix(config)

    def read(name: str) -> list[tuple[str, Tensor]]:
        tensor = read_canonical(source, name, config)
        progress(tensor)
        parts = hf_layout.split(recipes[name], tensor, config)
        return [
            (part if part == "lm_head.weight" else prefix + part, value) for part, value in parts
        ]

    item = getattr(torch, source.dtype).itemsize
    groups = [(name, prod(shape) * item) for name, shape in canonical_shapes(config).items()]
    hf_writer.write_safetensors(target, groups, read, file_bytes=file_bytes)
    _copy_side_files(source.path, target, tokens)
    (target / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def export_megatron(
    source: WeightSource,
    target: Path,
    *,
    tokens: Path | None = None,
    on_bytes: OnBytes | None = None,
    file_bytes: int = torch_dist_writer.FILE_BYTES,
) -> None:
    """Write a Megatron checkpoint root with a `release` iteration, loadable at any TP x PP.

    Its arguments are in common.pt, which every release of megatron-core from 0.16 to 0.19 reads.
    `tokens` is the tokenizer's folder (default: the one that lies with the source).

    Raises:
        ConfigError: the target is not empty.
        CheckpointError: the source does not hold exactly the model, or layers differ in dtype.
    """
    config = source.config
    progress = _start(source, target, on_bytes)
    writer = torch_dist_writer.TorchDistWriter(
        target / "release", config.num_layers, file_bytes=file_bytes
    )
    try:
        for name in canonical_shapes(config):
            tensor = read_canonical(source, name, config)
            progress(tensor)
            padded = shard(name, tensor, config, tp_rank=0, tp=1) if name in VOCAB_NAMES else tensor
            writer.add(name, padded)
        padded_vocab = padded_vocab_size(config.vocab_size, 1)
        writer.finish(model_config_to_args(config, padded_vocab=padded_vocab))
    finally:
        writer.close()
    _copy_side_files(source.path, target, tokens or tokenizer_folder(source.path))
    (target / TRACKER).write_text("release", encoding="utf-8")


def _expressible(config: ModelConfig) -> dict[str, object]:
    """The config.json of `config`, after checking that reading it gives `config` again."""
    hf = model_config_to_hf(config)
    again = model_config_from_hf(hf)
    lost = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in fields(config)
        if getattr(config, field.name) != getattr(again, field.name)
    ]
    if lost:
        raise ConfigError(
            f"Hugging Face's {config.family} classes cannot express this model: {', '.join(lost)}"
        )
    return hf


def _start(
    source: WeightSource, target: Path, on_bytes: OnBytes | None
) -> Callable[[Tensor], None]:
    """Check source and target and make the folder; the result reports each tensor read."""
    check_complete(source, source.config)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder: nothing is overwritten")
    target.mkdir(parents=True, exist_ok=True)
    item = getattr(torch, source.dtype).itemsize
    total = item * sum(prod(shape) for shape in canonical_shapes(source.config).values())
    done = 0

    def progress(tensor: Tensor) -> None:
        nonlocal done
        done += tensor.numel() * item
        if on_bytes is not None:
            on_bytes(done, total)

    return progress


def _with_ends(config: ModelConfig, tokens: Path | None) -> ModelConfig:
    """`config`, with the tokenizer's end tokens where it states none: config.json has to say."""
    if tokens is None or config.eos_token_ids:
        return config
    return with_end_tokens(config, tokens, Tokenizer.load(tokens))


def _copy_side_files(source: Path, target: Path, tokens: Path | None) -> None:
    """Copy tokenizer and generation settings, which Megatron roots have beside their iterations."""
    root = source.parent if (source.parent / TRACKER).is_file() else source
    for folder in (root, source) if tokens is None else (root, source, tokens):
        for name in _SIDE_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        if (folder / NAMED_FOLDER).is_dir():
            shutil.copytree(folder / NAMED_FOLDER, target / NAMED_FOLDER, dirs_exist_ok=True)
