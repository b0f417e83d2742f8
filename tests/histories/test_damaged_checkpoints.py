"""Checkpoints with random damage are refused as checkpoints, or can be read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from unit.checkpoint.checkpoints import LLAMA, MemorySource

from sps2_mega.checkpoint.export import export_megatron
from sps2_mega.checkpoint.source import open_checkpoint
from sps2_mega.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_random_damage_is_a_checkpoint_error_or_harmless(tmp_path: Path, name: str) -> None:
    export_megatron(MemorySource(LLAMA), tmp_path / "m")
    path = tmp_path / "m" / "release" / name
    good, generator, refused = path.read_bytes(), random.Random(7), 0
    for _ in range(200):
        damaged = bytearray(good)
        for _ in range(generator.choice([1, 1, 4])):
            damaged[generator.randrange(len(good))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.choice([None, None, generator.randrange(len(good))])])
        try:
            open_checkpoint(tmp_path / "m").shapes()
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > 65
