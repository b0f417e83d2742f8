"""Systems that the emulated cluster compares, and the models they run.

A system is a parallel layout with options of `EngineConfig`; every one runs the engine's own code.
The models have random weights: time does not depend on them, and shapes can then follow the
question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sps2_mega.checkpoint.huggingface.config import model_config_from_hf
from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.config import ModelConfig

VOCAB = 512
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 65536,
    "rope_theta": 1e6,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model; `llama` are fields of transformers' LlamaConfig, None for the bundled model."""

    name: str
    about: str
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    llama: dict[str, Any] | None
    longest: int


SHAPES = {
    "gqa": Shape(
        name="gqa",
        about="random Llama, hidden 256, 4 layers, 8 query and 2 KV heads (4:1, as Mistral 7B)",
        num_heads=8,
        num_kv_heads=2,
        vocab_size=VOCAB,
        llama=_LLAMA | {"num_key_value_heads": 2},
        longest=65535,
    ),
    "mha": Shape(
        name="mha",
        about="random Llama, hidden 256, 4 layers, 8 query and 8 KV heads (as Llama 2 7B)",
        num_heads=8,
        num_kv_heads=8,
        vocab_size=VOCAB,
        llama=_LLAMA | {"num_key_value_heads": 8},
        longest=65535,
    ),
    "wide": Shape(
        name="wide",
        about="random Llama, hidden 2048, 4 layers, 16 query and 4 KV heads: decode reads 0.7 GB "
        "of weights",
        num_heads=16,
        num_kv_heads=4,
        vocab_size=VOCAB,
        llama=_LLAMA
        | {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
        },
        longest=65535,
    ),
    "sps2-tiny": Shape(
        name="sps2-tiny",
        about="the bundled model, 8 query and 4 KV heads",
        num_heads=8,
        num_kv_heads=4,
        vocab_size=256,
        llama=None,
        longest=4095,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A configuration under comparison.

    All systems with the same `answer` must give equal logits. Stages of a `traced` system are
    recorded; TP has none.
    """

    name: str
    label: str
    layout: Literal["one", "tp", "sp"]
    answer: Literal["dense", "csa"] = "dense"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def traced(self) -> bool:
        return self.layout == "sp"

    @property
    def rival(self) -> bool:
        """Name shared by systems that differ in chunk size only, of which the best one is kept."""
        return "chunk_tokens" in self.options

    def degrees(self, num_nodes: int) -> dict[str, int]:
        """Degrees of TP and SP; a single rank is on the first node."""
        return {
            "tp": num_nodes if self.layout == "tp" else 1,
            "sp": num_nodes if self.layout == "sp" else 1,
        }


def systems(*, chunk_sizes: list[int], csa: dict[str, Any]) -> list[System]:
    """All systems, those without communication first; `csa` are fields of CSAConfig.

    The chunked baseline stands there once per chunk size, so that its best can be taken. Transports
    are forced: a planner would have measured the link before its rate changes.
    """
    off, on = {"pipeline": "off"}, {"pipeline": "on"}
    csa_on_ranks = {**csa, "transport": "gather"}
    return [
        System(name="alone", label="one rank", layout="one"),
        System(name="csa-alone", label="CSA, one rank", layout="one", answer="csa", options=csa),
        *(
            System(
                name=f"tp-chunked-{size}",
                label=f"TP, chunks of {size} (Sarathi)",
                layout="tp",
                options={"policy": "sarathi", "chunk_tokens": size},
            )
            for size in chunk_sizes
        ),
        System(name="tp", label="TP, whole prompt", layout="tp"),
        System(name="ring", label="SP ring", layout="sp", options={"transport": "ring", **on}),
        System(
            name="ulysses",
            label="SP Ulysses",
            layout="sp",
            options={"transport": "ulysses", **off},
        ),
        System(
            name="ulysses-pipelined",
            label="SP Ulysses, pipelined",
            layout="sp",
            options={"transport": "ulysses", **on},
        ),
        System(
            name="csa", label="SP CSA", layout="sp", answer="csa", options={**csa_on_ranks, **off}
        ),
        System(
            name="csa-pipelined",
            label="SP CSA, pipelined",
            layout="sp",
            answer="csa",
            options={**csa_on_ranks, **on},
        ),
    ]


def named(names: str, known: Collection[str], what: str) -> list[str]:
    """Names from a list separated by commas.

    Raises:
        ValueError: one is not known; those that are known are listed.
    """
    found = names.split(",")
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; known are {', '.join(known)}")
    return found


def shape_config(shape: Shape) -> ModelConfig:
    """ModelConfig of the shape, in float32, as it is run here."""
    if shape.llama is None:
        config = named_model_file(shape.name).config
    else:
        config = model_config_from_hf(
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | shape.llama
        )
    return dataclasses.replace(config, dtype="float32")


def model_path(shape: Shape, folder: Path) -> str:
    """Argument of `--model`: a Hugging Face folder written below `folder`, or the bundled name."""
    if shape.llama is None:
        return shape.name
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(**shape.llama)
    target = folder / shape.name
    transformers.LlamaForCausalLM(config).save_pretrained(target)
    return str(target)
