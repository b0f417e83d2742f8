"""Small random models of every supported family, saved by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCAB = 131  # not divisible by anything
LENGTHS = (1, 7, 64, 1000)
_ROPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    initializer_range=0.12,
    eos_token_id=VOCAB - 1,
    bos_token_id=0,
)


@dataclass(frozen=True)
class Family:
    config_class: str
    options: dict[str, Any]


FAMILIES = {
    "llama2": Family("LlamaConfig", _ROPE | dict(num_key_value_heads=8)),
    "llama-one-kv-head": Family(
        "LlamaConfig", _ROPE | dict(num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)
    ),
    "llama3-rope": Family(
        "LlamaConfig",
        _ROPE
        | dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=5e5,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=256,
            )
        ),
    ),
    "mistral-window": Family("MistralConfig", _ROPE | dict(sliding_window=37)),
    "qwen2-yarn": Family(
        "Qwen2Config",
        _ROPE
        | dict(
            num_key_value_heads=2,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e4,
                factor=4.0,
                original_max_position_embeddings=256,
            ),
        ),
    ),
    "qwen3": Family("Qwen3Config", _ROPE | dict(head_dim=16)),
    "gpt2": Family(
        "GPT2Config",
        dict(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=2,
            n_head=8,
            n_positions=1200,
            initializer_range=0.12,
            eos_token_id=VOCAB - 1,
            bos_token_id=0,
        ),
    ),
}


def save_family(name: str, folder: Path) -> Any:
    """Create, save and return the transformers model (float32, eval)."""
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, family.config_class)(**family.options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms start at constants that hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, VOCAB - 1, (length,), generator=generator).tolist() for length in lengths
    ]
