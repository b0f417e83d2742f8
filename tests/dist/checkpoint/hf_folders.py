"""Hugging Face folders whose config.json has fields changed, at random or one by one, and the
logits that transformers makes of them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sps2_mega.checkpoint.huggingface.fields import HARMLESS

TOKENS = [(7 * i * i + 3 * i) % 61 for i in range(45)]
_ROTARY: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
BASES: dict[str, dict[str, Any]] = {
    "llama": _ROTARY,
    # transformers 5.23 makes a Ministral of one with layer_types, and misses a head_dim there.
    "mistral": _ROTARY | dict(head_dim=8),
    "qwen2": _ROTARY,
    "qwen3": _ROTARY | dict(head_dim=16),
    "gpt2": dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"type": "linear", "factor": 2.0}
FULL, SLIDING = ["full_attention"] * 2, ["sliding_attention"] * 2


def write_folder(folder: Path, family: str, fields: dict[str, Any]) -> torch.Tensor:
    """Write a model with random weights; transformers' logits [T, vocab] of `TOKENS`.

    Raises whatever transformers raises where it cannot make the model.
    """
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": family} | BASES[family] | fields
    (folder / "config.json").write_text(json.dumps(content))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + noise * 0.1)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tensors = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return logits_of(model)


def saved_logits(folder: Path) -> torch.Tensor:
    """Logits of the weights that transformers itself takes from a folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return logits_of(model.eval())


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0].float().clone()


@dataclass(frozen=True, slots=True)
class Drawn:
    family: str
    changes: dict[str, Any]


# Values of fields that decide what is computed: some can be run, some are wrong.
_SHARED: dict[str, list[Any]] = {
    "vocab_size": [97, 64, 0, "61", None, 61.0],
    "tie_word_embeddings": [True, False, "yes", None],
    "dtype": ["float32", "bfloat16", "float16", "float64", "int8", 5, None],
    "torch_dtype": ["bfloat16", "float32", "odd"],
    "eos_token_id": [3, [3, 5], [], -1, "x", None, 1.5],
    "bos_token_id": [0, None, "x", [1]],
    "architectures": [None, ["SomethingElse"], [], 5],
    "is_causal": [True, False, None],
    "is_encoder_decoder": [False, True],
    "add_cross_attention": [False, True],
    "pruned_heads": [{}, {"0": [1]}],
    "quantization_config": [None, {"quant_method": "gptq", "bits": 4}],
    "auto_map": [
        None,
        {"AutoConfig": "configuration_x.XConfig"},
        {"AutoModelForCausalLM": "modeling_x.XForCausalLM"},
    ],
    "per_layer_config": [{"0": {"num_key_value_heads": 4}}],
}
# Those at which transformers looks without an effect, at values that would have one.
_IDLE: dict[str, list[Any]] = {
    "pad_token_id": [3], "attention_dropout": [0.5], "initializer_range": [0.5],
    "use_cache": [False], "return_dict": [False], "output_hidden_states": [True],
    "gradient_checkpointing": [True], "_attn_implementation": ["eager"],
    "reorder_and_upcast_attn": [True], "attn_pdrop": [0.5], "embd_pdrop": [0.5],
    "resid_pdrop": [0.5], "name_or_path": ["x"], "_name_or_path": ["x"],
}  # fmt: skip
_OF_ROTARY: dict[str, list[Any]] = _SHARED | {
    "num_hidden_layers": [1, 3, 0, -1, "2", None, 2.0, True],
    "hidden_size": [16, 24, 48, 64, 0, "32", None, 31],
    "intermediate_size": [1, 37, 64, 0, None, "x"],
    "num_attention_heads": [2, 8, 1, 0, "4", None, 3],
    "num_key_value_heads": [1, 4, None, 3, 0, "2", 8],
    "head_dim": [4, 6, 16, 24, None, 5, 0, "x"],
    "hidden_act": ["silu", "gelu", "relu", "swish", None, 5],
    "max_position_embeddings": [45, 128, None, 0, "64", 64.5],
    "rms_norm_eps": [1e-5, 1e-2, 0.0, None, -1.0, "abc", 1],
    "attention_bias": [False, True, None, "no"],
    "mlp_bias": [False, True, None],
    "rope_theta": [10000.0, 500000, 100.0, 1, None, "x", 0, -5.0],
    "partial_rotary_factor": [1.0, 0.5, None, "x"],
    "original_max_position_embeddings": [16, 32, None, "x"],
    "rope_scaling": [
        YARN, LLAMA3, LINEAR, {}, None, {"type": "dynamic", "factor": 2.0}, YARN | {"beta_slow": 0},
        YARN | {"beta_fast": 4.0, "beta_slow": 2.0}, YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
        YARN | {"attention_factor": 1.3}, YARN | {"truncate": False}, YARN | {"mscale": 0.7},
        YARN | {"rope_theta": 300.0}, YARN | {"partial_rotary_factor": 0.5}, {"rope_type": "yarn"},
        {"rope_type": "yarn", "factor": 4}, YARN | {"factor": None}, YARN | {"odd": 1},
        LLAMA3 | {"high_freq_factor": 1.0}, LLAMA3 | {"type": "linear"}, {"factor": 4.0},
        LINEAR | {"rope_type": "default"}, LINEAR | {"rope_theta": 99.5}, "yarn", 5, ["yarn"],
        {"type": "linear"}, {"type": "longrope", "factor": 2.0}, {"rope_type": "mrope"},
        {"type": "su", "factor": 1.0}, LINEAR | {"factor": 0.5}, YARN | {"factor": 0.5},
        {"full_attention": YARN, "sliding_attention": LINEAR}, {"rope_type": None, "factor": 2.0},
        YARN | {"original_max_position_embeddings": None}, YARN | {"rope_theta": None},
        YARN | {"truncate": None}, YARN | {"partial_rotary_factor": None}, {"rope_theta": 77.0},
        YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None, "mscale": None},
        {"rope_type": "default", "partial_rotary_factor": None}, LINEAR | {"factor": 1},
        LINEAR | {"original_max_position_embeddings": 16}, LLAMA3 | {"beta_fast": 4.0},
        {"rope_type": "proportional", "rope_theta": 50.0, "factor": 2.0},
    ],
    "layer_types": [
        FULL, SLIDING, None, [], FULL[:1] + SLIDING[:1], FULL[:1], ["attention"] * 2, 5,
        ["full_attention"] * 3, ["linear_attention"] * 2,
    ],
    "sliding_window": [7, 44, 100, None, 0, -1, "x", 1],
    "use_sliding_window": [True, False, None, "yes"],
    "max_window_layers": [0, 1, 2, 3, None, -1],
    "attn_logit_softcapping": [30.0, None],
    "final_logit_softcapping": [5.0],
    "logits_scaling": [8.0],
    "use_mrope": [True, False],
    "rope_interleaved": [True, False],
    "num_local_experts": [4],
    "mlp_layer_types": [["dense"] * 2, ["sparse"] * 2],
}  # fmt: skip
_OF_ROTARY["rope_parameters"] = [
    {"rope_theta": 5e5, **value} if isinstance(value, dict) and number % 2 else value
    for number, value in enumerate(_OF_ROTARY["rope_scaling"])
]
_OF_GPT2: dict[str, list[Any]] = _SHARED | {
    "n_layer": [1, 3, 0, "2", None],
    "n_embd": [16, 64, 0, None, 33, "x"],
    "n_head": [1, 2, 8, 3, 0, "4", None],
    "n_positions": [45, 80, 0, None, 64.0],
    "n_inner": [None, 48, 1, 0, "x"],
    "activation_function": ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "gelu_fast", None, 1],
    "layer_norm_epsilon": [1e-3, 0.0, None, -1.0, "x"],
    "scale_attn_weights": [True, False, None],
    "scale_attn_by_inverse_layer_idx": [False, True, None],
    "reorder_and_upcast_attn": [True, False],
    "n_ctx": [32, 64],
    "hidden_size": [64],  # GPT-2 has the general names as aliases
    "num_attention_heads": [2],
    "num_hidden_layers": [3],
    "max_position_embeddings": [80],
    "rope_scaling": [YARN],
    "sliding_window": [7],
}
# Changes that only mean something together.
_TOGETHER: list[dict[str, Any]] = [
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 7, "layer_types": SLIDING},
    {"use_sliding_window": True, "sliding_window": None, "layer_types": SLIDING},
    {"use_sliding_window": False, "sliding_window": 7, "layer_types": SLIDING},
    {"use_sliding_window": True, "sliding_window": 7, "layer_types": FULL},
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    {"sliding_window": 7, "layer_types": SLIDING},
    {"sliding_window": 7, "layer_types": FULL},
    {"sliding_window": None, "layer_types": SLIDING},
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_scaling": YARN},
    {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LINEAR, "rope_theta": 2e4},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": {}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": None},
    {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 30},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24, "head_dim": 10},
]
_ANYTHING: list[Any] = [True, False, 0, 1, 7, 0.5, "text", "eager", [1], {"a": 1}, {}, None]


def draw(seed: int) -> Drawn:
    """The folder of a seed: a family, and one to three changes of its config.json."""
    chance = random.Random(seed)
    family = chance.choice(sorted(BASES))
    run = _OF_GPT2 if family == "gpt2" else _OF_ROTARY
    changes: dict[str, Any] = {}
    for _ in range(chance.choice((1, 1, 2, 3))):
        kind = chance.choices(("run", "together", "harmless", "unknown"), (6, 2, 2, 0.3))[0]
        if kind == "together" and family != "gpt2":
            changes |= chance.choice(_TOGETHER)
        elif kind == "harmless":
            changes.setdefault(chance.choice(sorted(HARMLESS)), chance.choice(_ANYTHING))
        elif kind == "unknown":
            changes["attention_of_tomorrow"] = chance.choice(_ANYTHING)
        else:
            name = chance.choice(sorted(run))
            changes[name] = chance.choice(run[name])
    return Drawn(family, changes)


def every_change() -> list[Drawn]:
    """Each value of each field, alone, and each group of changes, in every family."""
    drawn = []
    for family in BASES:
        run = _OF_GPT2 if family == "gpt2" else _OF_ROTARY
        drawn += [
            Drawn(family, {name: value}) for name in run | _IDLE for value in (run | _IDLE)[name]
        ]
        if family != "gpt2":
            drawn += [Drawn(family, changes) for changes in _TOGETHER]
    return drawn
