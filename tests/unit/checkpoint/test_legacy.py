"""Rank files of Megatron's older format that are not of megatron-core, or state no architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sps2_mega.checkpoint.source import open_checkpoint
from sps2_mega.errors import CheckpointError, ConfigError

EMBEDDING = {"word_embeddings": {"weight": torch.zeros(8, 4)}}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"language_model": {"embedding": EMBEDDING}}, CheckpointError, "`language_model` of Mega"),
        (
            {"embedding.word_embeddings.weight": torch.zeros(8, 4)},
            ConfigError,
            "a Megatron legacy file without `args`",
        ),
    ],
)
def test_the_kind_of_file_is_named(
    tmp_path: Path, model: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = tmp_path / "iter_0000007" / "mp_rank_00"
    folder.mkdir(parents=True)
    state = {"checkpoint_version": 3.0, "iteration": 7, "model": model}
    torch.save(state, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)
