"""The same architecture in transformers, with random weights made on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.part import Part
from sps2_mega.checkpoint.huggingface.config import model_config_to_hf
from sps2_mega.checkpoint.resolve import resolve_model


def transformers_model(part: Part, *, longest: int) -> Any:
    """A causal language model for texts of `longest` tokens, with torch's SDPA."""
    import transformers

    ours = resolve_model(part.sizes.model, needs_weights=False).config
    fields = model_config_to_hf(replace(ours, max_position_embeddings=longest))
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device(part.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=part.dtype
        )
    return model.eval().requires_grad_(False)
