"""Small handmade checkpoints for the tests of this folder."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from sps2_mega.checkpoint.canonical import VOCAB_NAMES, canonical_shapes
from sps2_mega.checkpoint.huggingface.config import model_config_to_hf
from sps2_mega.checkpoint.megatron.settings.arguments import OWN_CONFIG, model_config_to_args
from sps2_mega.checkpoint.megatron.torch_dist_writer import TorchDistWriter
from sps2_mega.checkpoint.source import TRACKER
from sps2_mega.checkpoint.weight_source import WeightSource
from sps2_mega.config import ModelConfig, RopeConfig

LLAMA = ModelConfig(
    family="llama",
    num_layers=3,
    hidden_size=20,
    ffn_hidden_size=28,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=37,
    max_position_embeddings=64,
    dtype="bfloat16",
)
GPT2 = ModelConfig(
    family="gpt2",
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=96,
    num_heads=4,
    num_kv_heads=4,
    head_dim=6,
    vocab_size=41,
    max_position_embeddings=16,
    norm="layernorm",
    activation="gelu_tanh",
    linear_bias=True,
    tie_embeddings=True,
    rope=None,
    dtype="float32",
)
CONFIGS = {
    "llama": LLAMA,
    "llama tied": replace(LLAMA, tie_embeddings=True),
    "mistral": replace(LLAMA, family="mistral", sliding_window=5, dtype="float16"),
    "qwen2": replace(
        LLAMA,
        family="qwen2",
        qkv_bias=True,
        eos_token_ids=(3, 5),
        rope=RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True, num_kv_heads=6, dtype="float32"),
    "gpt2": GPT2,
}


class MemorySource(WeightSource):
    """Source of random canonical weights; vocabulary rows can be padded and names left out."""

    format = "memory"
    iteration = None
    saved_layout = None
    path = Path("memory")

    def __init__(self, config: ModelConfig, *, padding: int = 0) -> None:
        self.config, self.dtype = config, config.dtype
        generator = torch.Generator().manual_seed(1)
        self.weights = {
            name: torch.randn(shape, generator=generator).to(getattr(torch, config.dtype))
            for name, shape in canonical_shapes(config).items()
        }
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if padding and name in self.weights:
                rows = self.weights[name].new_zeros(padding, config.hidden_size)
                self.weights[name] = torch.cat((self.weights[name], rows))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.weights.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def origin(self, name: str) -> str:
        return f"memory:{name}"


def write_hf(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a Hugging Face folder with exactly these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model_config_to_hf(config)))
    return folder


def write_megatron(
    root: Path, config: ModelConfig, *, rows: int, args: Mapping[str, object]
) -> Path:
    """Write a torch_dist checkpoint as a training run does: with `args` besides the architecture,
    no configuration of ours, and `rows` of vocabulary, those beyond the tokens like the last."""
    source = MemorySource(config)
    writer = TorchDistWriter(root / "release", config.num_layers)
    for name, tensor in source.weights.items():
        if name in VOCAB_NAMES:
            tensor = torch.cat((tensor, tensor[-1:].expand(rows - len(tensor), -1)))
        writer.add(name, tensor)
    stored = vars(model_config_to_args(config, padded_vocab=rows)) | dict(args)
    del stored[OWN_CONFIG]
    writer.finish(Namespace(**stored))
    writer.close()
    (root / TRACKER).write_text("release")
    return root
