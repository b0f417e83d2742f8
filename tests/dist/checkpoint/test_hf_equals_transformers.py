"""Hugging Face folders that vary: transformers' logits, or a refusal that names the field."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from dist.checkpoint.hf_folders import TOKENS, Drawn, draw, every_change, write_folder
from model_run import joined_groups, prompt_logits

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
    """Transformers' logits where it only refuses the type of a field that has no effect."""
    idle = HARMLESS | {"auto_map"}  # at a null, on which it stumbles
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


def test_some_random_folders_are_equal_or_refused(tmp_path: Path) -> None:
    counts = check(outcomes([draw(seed) for seed in range(30)], tmp_path))
    assert counts["equal"] >= 8 and counts["refused"] >= 8


@pytest.mark.slow
def test_three_hundred_random_folders_are_equal_or_refused(tmp_path: Path) -> None:
    counts = check(outcomes([draw(seed) for seed in range(1000, 1300)], tmp_path))
    print(f"\n{dict(counts)}")
    assert counts["equal"] >= 80


@pytest.mark.slow
def test_every_value_of_every_field_alone(tmp_path: Path) -> None:
    counts = check(outcomes(every_change(), tmp_path))
    print(f"\n{dict(counts)}")
