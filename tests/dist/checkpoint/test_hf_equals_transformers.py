"""Hugging Face folders that vary: transformers' logits, or a refusal that names the field."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from dist.checkpoint.hf_folders import (
    FULL,
    LINEAR,
    LLAMA3,
    SLIDING,
    TOKENS,
    YARN,
    Drawn,
    draw,
    every_change,
    saved_logits,
    write_folder,
)
from model_run import joined_groups, prompt_logits
from safetensors.torch import load_file, save_file

from sps2_mega.checkpoint.huggingface.config import read_hf_config
from sps2_mega.checkpoint.huggingface.fields import HARMLESS
from sps2_mega.errors import ConfigError

TOLERANCE = 1e-4


def logits_on_rank(rank: int, port: int, folders: dict[str, str]) -> dict[str, torch.Tensor]:
    """Logits [T, vocab] of `TOKENS` for every folder that opens."""
    from sps2_mega.checkpoint.load import load_weights
    from sps2_mega.checkpoint.source import open_checkpoint
    from sps2_mega.mcore.gpt import GPT
    from sps2_mega.mcore.init import finalize

    groups, results = joined_groups(port, tp=1, sp=1), {}
    for name, folder in folders.items():
        source = open_checkpoint(folder)
        config = source.config
        model = GPT(config, groups, dtype=torch.float32, device=torch.device("cpu"))
        load_weights(model.weights(), source, config, tp_rank=0, tp=1)
        parts = prompt_logits(model, config, [TOKENS], groups, "gather", "contiguous", num_blocks=8)
        results[name] = torch.cat([logits for _, _, logits in sorted(parts, key=lambda p: p[1])])
    finalize()
    return results


def our_logits(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    texts = {name: str(folder) for name, folder in folders.items()}
    (results,) = harness.run_ranks(logits_on_rank, 1, harness.free_port(), texts, timeout=300)
    return results


def outcomes(folders: list[Drawn], root: Path) -> dict[int, tuple[str, Any]]:
    """Number of a folder -> what becomes of it, and details."""
    pytest.importorskip("transformers")
    found: dict[int, tuple[str, Any]] = {}
    expected: dict[str, torch.Tensor] = {}
    for number, drawn in enumerate(folders):
        folder = root / str(number)
        refusal = wanted = None
        try:
            wanted = write_folder(folder, drawn.family, drawn.changes)
        except Exception as error:  # noqa: BLE001 (whatever transformers raises)
            raised = f"{type(error).__name__}: {error}"
        try:
            read_hf_config(folder)
        except ConfigError as error:
            refusal = str(error)
        if refusal is None and wanted is None:
            wanted = without_harmless(folder, drawn)
        if refusal is not None:
            named = any(re.search(rf"\b{name}\b", refusal) for name in drawn.changes)
            found[number] = ("refused" if named else "misnamed", (drawn, refusal))
        elif wanted is None:
            found[number] = ("transformers refuses it", (drawn, raised))
        else:
            expected[str(number)] = wanted
    ours = our_logits({name: root / name for name in expected})
    for name, wanted in expected.items():
        difference = (
            (ours[name] - wanted).abs().max().item()
            if ours[name].shape == wanted.shape
            else tuple(ours[name].shape)
        )
        equal = isinstance(difference, float) and difference < TOLERANCE
        found[int(name)] = ("equal" if equal else "different", (folders[int(name)], difference))
    return found


def without_harmless(folder: Path, drawn: Drawn) -> torch.Tensor | None:
    """Transformers' logits where it only stumbles over a field that has no effect: one that is
    harmless, a null `auto_map`, full layers without a window (Ministral wants one anyway)."""
    idle = HARMLESS | {"auto_map"}
    if drawn.changes.get("layer_types") == FULL:
        idle |= {"layer_types"}
    rest = {name: value for name, value in drawn.changes.items() if name not in idle}
    stated = (folder / "config.json").read_text()
    try:
        return write_folder(folder, drawn.family, rest)
    except Exception:  # noqa: BLE001 (whatever transformers raises)
        return None
    finally:
        (folder / "config.json").write_text(stated)


def check(found: dict[int, tuple[str, Any]]) -> collections.Counter[str]:
    wrong = [result for result in found.values() if result[0] not in ("equal", "refused")]
    assert not wrong, "\n".join(map(str, wrong))
    return collections.Counter(kind for kind, _ in found.values())


ODD = dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3, intermediate_size=37)
THETA = {"rope_theta": 5e5}
# As users write and tools save them: whether they run, else they are refused by the first name.
VARIATIONS: list[tuple[str, dict[str, Any], bool]] = [
    ("llama", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"} | THETA}, True),
    ("llama", {"rope_scaling": YARN, "rope_parameters": THETA, "rope_theta": 2e4}, True),
    ("llama", {"rope_scaling": YARN | {"beta_slow": 0}, "rope_parameters": THETA}, True),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": THETA}, True),
    ("mistral", {"rope_scaling": LLAMA3, "rope_parameters": THETA, "rope_theta": 2e4}, True),
    ("qwen2", {"rope_scaling": LLAMA3 | THETA, "rope_parameters": YARN}, True),
    ("qwen3", {"rope_scaling": YARN | {"attention_factor": 0.7}, "rope_theta": 1e6}, True),
    ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, False),
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, False),
    ("mistral", {"sliding_window": 7}, True),
    ("mistral", {"sliding_window": 7, "layer_types": FULL}, True),
    ("mistral", {"sliding_window": 7, "layer_types": SLIDING}, True),
    ("mistral", {"sliding_window": None, "layer_types": FULL}, True),
    ("mistral", {"layer_types": FULL[:1] + SLIDING[:1], "sliding_window": 7}, False),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, True),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": SLIDING}, True),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": FULL}, True),
    ("qwen2", {"layer_types": SLIDING, "sliding_window": 7}, False),
    ("llama", {"is_causal": False}, False),
    ("llama", {"attention_bias": True}, False),
    ("qwen2", {"attention_bias": False}, True),
    ("llama", {"mlp_bias": True}, False),
    *((family, {"tie_word_embeddings": True}, True) for family in ("llama", "qwen3", "mistral")),
    ("gpt2", {"tie_word_embeddings": False}, True),
    ("gpt2", {"activation_function": "gelu", "n_inner": 37, "layer_norm_epsilon": 1e-2}, True),
    ("llama", {"head_dim": 24}, True),
    ("mistral", {"head_dim": 4, "num_attention_heads": 6, "num_key_value_heads": 1}, True),
    ("qwen3", ODD | {"head_dim": 10}, True),
    ("llama", ODD | {"vocab_size": 67, "num_hidden_layers": 3}, True),
    ("qwen2", ODD | {"num_hidden_layers": 1, "rms_norm_eps": 1e-2}, True),
]  # fmt: skip


def test_variations_of_the_configuration(tmp_path: Path) -> None:
    drawn = [Drawn(family, fields) for family, fields, _ in VARIATIONS]
    found = outcomes(drawn, tmp_path)
    check(found)
    for number, (family, fields, runs) in enumerate(VARIATIONS):
        kind, details = found[number]
        assert (kind == "equal") == runs, (family, fields, details)
        if not runs:
            assert next(iter(fields)) in details[1]


def _shards(folder: Path) -> None:
    """Two shards and their index instead of one file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    half = len(names) // 2
    where = {
        name: f"model-{1 + (number >= half)}-of-2.safetensors" for number, name in enumerate(names)
    }
    for file in set(where.values()):
        held = {name: tensors[name] for name in names if where[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _stale_index(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-1-of-9.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _others(folder: Path) -> None:
    other = {"model.norm.weight": torch.zeros(32)}
    for name in ("consolidated", "adapter_model", "model.fp16", "model-00001-of-00002"):
        save_file(other, folder / f"{name}.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")


def _others_beside_shards(folder: Path) -> None:
    _shards(folder)
    _others(folder)


def _both(folder: Path) -> None:
    """model.safetensors, and shards with an index that have other weights."""
    tensors = load_file(folder / "model.safetensors")
    _shards(folder)
    changed = {name: tensor * 0.5 for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def _without_prefix(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})


FILE_SETS: list[Callable[[Path], object]] = [
    _shards, _stale_index, _others, _others_beside_shards, _both, _without_prefix,
]  # fmt: skip


def test_the_files_that_transformers_takes(tmp_path: Path) -> None:
    folders = {change.__name__: tmp_path / change.__name__ for change in FILE_SETS}
    expected = {}
    for change in FILE_SETS:
        folder = folders[change.__name__]
        write_folder(folder, "llama", {})
        change(folder)
        expected[change.__name__] = saved_logits(folder)
    for name, logits in our_logits(folders).items():
        assert (logits - expected[name]).abs().max() < TOLERANCE, name


def test_some_random_folders_are_equal_or_refused(tmp_path: Path) -> None:
    counts = check(outcomes([draw(seed) for seed in range(30)], tmp_path))
    assert counts["equal"] >= 8 and counts["refused"] >= 8


@pytest.mark.exhaustive
def test_three_hundred_random_folders_are_equal_or_refused(tmp_path: Path) -> None:
    counts = check(outcomes([draw(seed) for seed in range(1000, 1300)], tmp_path))
    print(f"\n{dict(counts)}")
    assert counts["equal"] >= 80


@pytest.mark.exhaustive
def test_every_value_of_every_field_alone(tmp_path: Path) -> None:
    counts = check(outcomes(every_change(), tmp_path))
    print(f"\n{dict(counts)}")
