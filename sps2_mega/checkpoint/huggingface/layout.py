"""Hugging Face's spelling of the canonical weights: a table per architecture, for both directions.

A `Recipe` says which file tensors form one canonical tensor and how. The same recipe joins them for
reading and splits them for writing. Reader and writer add prefixes (`model.`, `transformer.`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sps2_mega.checkpoint.canonical import Shape, canonical_shapes, split_layer
from sps2_mega.config import ModelConfig

How = Literal["copy", "qkv", "gate_up", "transpose", "qkv_columns"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """File tensors of one canonical tensor: their names without prefix and their shapes.

    copy: unchanged. qkv: q, k, v joined per query group. gate_up: stacked.
    transpose: the file has [in, out]. qkv_columns: GPT-2's single tensor [in, 3 *
    hidden] (or [3 * hidden]), q, k and v as its columns.
    """

    how: How
    parts: tuple[str, ...]
    shapes: tuple[Shape, ...]


_TOP = {
    "embedding.word_embeddings.weight": "embed_tokens.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER: dict[str, tuple[How, tuple[str, ...]]] = {
    "input_layernorm": ("copy", ("input_layernorm",)),
    "self_attention.linear_qkv": ("qkv", tuple(f"self_attn.{x}_proj" for x in "qkv")),
    "self_attention.linear_proj": ("copy", ("self_attn.o_proj",)),
    "self_attention.q_layernorm": ("copy", ("self_attn.q_norm",)),
    "self_attention.k_layernorm": ("copy", ("self_attn.k_norm",)),
    "pre_mlp_layernorm": ("copy", ("post_attention_layernorm",)),
    "mlp.linear_fc1": ("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    "mlp.linear_fc2": ("copy", ("mlp.down_proj",)),
}
_GPT2_TOP = {
    "embedding.word_embeddings.weight": "wte.weight",
    "embedding.position_embeddings.weight": "wpe.weight",
    "decoder.final_layernorm.weight": "ln_f.weight",
    "decoder.final_layernorm.bias": "ln_f.bias",
    "output_layer.weight": "lm_head.weight",
}
_GPT2_LAYER: dict[str, tuple[How, tuple[str, ...]]] = {
    "input_layernorm": ("copy", ("ln_1",)),
    "self_attention.linear_qkv": ("qkv_columns", ("attn.c_attn",)),
    "self_attention.linear_proj": ("transpose", ("attn.c_proj",)),
    "pre_mlp_layernorm": ("copy", ("ln_2",)),
    "mlp.linear_fc1": ("transpose", ("mlp.c_fc",)),
    "mlp.linear_fc2": ("transpose", ("mlp.c_proj",)),
}

PREFIXES = {"gpt2": "transformer."}
"""Prefix of all names but `lm_head.weight`; `model.` for every other family."""

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Buffers saved with the weights by old transformers; they follow from the configuration."""


def prefix(config: ModelConfig) -> str:
    return PREFIXES.get(config.family, "model.")


def recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Canonical name -> recipe, for every weight of the model."""
    return {name: _recipe(name, shape, config) for name, shape in canonical_shapes(config).items()}


def join(recipe: Recipe, parts: list[Tensor], config: ModelConfig) -> Tensor:
    """Form the canonical tensor from file tensors."""
    match recipe.how:
        case "copy":
            return parts[0]
        case "transpose":
            return parts[0].t() if parts[0].dim() == 2 else parts[0]
        case "gate_up":
            return torch.cat(parts)
        case "qkv":
            return _join_qkv(parts, config)
        case "qkv_columns":
            qkv = parts[0].t() if parts[0].dim() == 2 else parts[0]
            return _join_qkv(list(qkv.chunk(3, 0)), config)


def split(recipe: Recipe, tensor: Tensor, config: ModelConfig) -> list[tuple[str, Tensor]]:
    """Split a canonical tensor into (file name without prefix, contiguous file tensor).

    The inverse of `join`.
    """
    match recipe.how:
        case "copy":
            parts = [tensor]
        case "transpose":
            parts = [tensor.t() if tensor.dim() == 2 else tensor]
        case "gate_up":
            parts = list(tensor.chunk(2, 0))
        case "qkv":
            parts = _split_qkv(tensor, config)
        case "qkv_columns":
            qkv = torch.cat(_split_qkv(tensor, config))
            parts = [qkv.t() if qkv.dim() == 2 else qkv]
    return [(name, part.contiguous()) for name, part in zip(recipe.parts, parts, strict=True)]


def _recipe(name: str, shape: Shape, config: ModelConfig) -> Recipe:
    top, layers = (_GPT2_TOP, _GPT2_LAYER) if config.family == "gpt2" else (_TOP, _LAYER)
    index, rest = split_layer(name)
    if index is None:
        return Recipe("copy", (top[name],), (shape,))
    module, _, kind = rest.rpartition(".")
    how, modules = layers[module]
    folder = "h" if config.family == "gpt2" else "layers"
    parts = tuple(f"{folder}.{index}.{part}.{kind}" for part in modules)
    return Recipe(how, parts, _part_shapes(how, shape, config))


def _part_shapes(how: How, shape: Shape, config: ModelConfig) -> tuple[Shape, ...]:
    match how:
        case "copy":
            return (shape,)
        case "transpose" | "qkv_columns":
            return (shape[::-1],)
        case "gate_up":
            return ((shape[0] // 2, *shape[1:]),) * 2
        case "qkv":
            heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
            return tuple((n * config.head_dim, *shape[1:]) for n in heads)


def _join_qkv(parts: list[Tensor], config: ModelConfig) -> Tensor:
    rest = parts[0].shape[1:]
    grouped = [part.reshape(config.num_kv_heads, -1, *rest) for part in parts]
    return torch.cat(grouped, 1).reshape(-1, *rest)


def _split_qkv(tensor: Tensor, config: ModelConfig) -> list[Tensor]:
    kv, dim, rest = config.num_kv_heads, config.head_dim, tensor.shape[1:]
    grouped = tensor.reshape(kv, -1, *rest)
    sizes = (config.num_heads // kv * dim, dim, dim)
    return [part.reshape(-1, *rest) for part in grouped.split(sizes, 1)]
