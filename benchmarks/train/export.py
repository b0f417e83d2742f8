"""Conversion of the trained model to a Hugging Face folder and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.train.config import MODEL_CONFIGS
from benchmarks.train.model import TinyLlama
from sps2_mega.checkpoint.huggingface.config import model_config_from_hf, model_config_to_hf
from sps2_mega.errors import CheckpointError

# A byte-level tokenizer needs no training: all of these models share the bundled one.
_TOKENIZER = MODEL_CONFIGS / "sps2-tiny"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def save_model(model: TinyLlama, folder: Path) -> None:
    """Write config.json, bfloat16 weights and the byte-level tokenizer.

    Files of the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = model_config_to_hf(model.config)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for name in _TOKENIZER_FILES:
        if folder.resolve() != _TOKENIZER:
            shutil.copyfile(_TOKENIZER / name, folder / name)


def load_model(folder: Path) -> TinyLlama:
    """Model with float32 weights from a folder of the architecture trained here.

    Raises:
        ConfigError: the architecture is another one.
        CheckpointError: the folder has no weights of one file, or other tensors than the
            architecture's.
    """
    weights = folder / "model.safetensors"
    if not weights.is_file() or not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} needs config.json and model.safetensors")
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = TinyLlama(model_config_from_hf(described))
    tensors = {n.removeprefix("model."): t.float() for n, t in load_file(weights).items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    return model
