"""Models and prompts of the offline comparisons."""

from __future__ import annotations

import json
import random
from pathlib import Path

_VOCAB_SIZE = 32000
# Llama-like, 200,827,904 parameters.
DUMMY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": _VOCAB_SIZE,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def source_prompts(count: int, shortest: int, longest: int) -> list[str]:
    """Python source of the standard library, cut to lengths spread geometrically over the range."""
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))
    texts = [f.read_text(errors="ignore") for f in files]
    texts = [text for text in texts if len(text) > longest and text.isascii()][:count]
    ratio = longest / shortest
    return [
        text[: int(shortest * ratio ** (i / max(1, count - 1)))] for i, text in enumerate(texts)
    ]


def random_prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """Token ids of the dummy Llama, without its special tokens."""
    generator = random.Random(seed)
    return [[generator.randrange(3, _VOCAB_SIZE) for _ in range(length)] for length in lengths]


def save_dummy_llama(folder: Path) -> str:
    """Write a model folder without weights, for `load_format="dummy"`, and return its path."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(DUMMY_LLAMA))
    return str(folder)
